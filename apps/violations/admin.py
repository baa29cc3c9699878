"""Violations, to look at; they are acknowledged on their own page."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.violations.models import Violation


@admin.register(Violation)
class ViolationAdmin(ReadOnlyAdmin):
    page = ("violations",)
    list_display = ("uid", "rule", "severity", "run", "layer", "created_at", "acknowledged_by")
    list_filter = ("rule", "severity")
    search_fields = ("uid", "layer")
