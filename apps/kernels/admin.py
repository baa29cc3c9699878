"""Kernels, to look at."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.kernels.models import Kernel


@admin.register(Kernel)
class KernelAdmin(ReadOnlyAdmin):
    page = ("kernel", "digest")
    list_display = ("digest", "blueprint_slug", "layer_kind", "capability", "build_ms", "uses")
    list_filter = ("capability", "blueprint_slug")
    search_fields = ("digest",)
