"""The catalogue, to look at; it is switched on its own page, with a reason."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.blueprints.models import Blueprint


@admin.register(Blueprint)
class BlueprintAdmin(ReadOnlyAdmin):
    list_display = ("slug", "category", "kind", "risk", "enabled", "present")
    list_filter = ("category", "risk", "enabled")
    search_fields = ("slug", "title")
