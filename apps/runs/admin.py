"""Runs and their command logs, read-only."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.runs.models import Command, Run


@admin.register(Run)
class RunAdmin(ReadOnlyAdmin):
    page = ("run", "uid")
    list_display = ("uid", "name", "owner", "mode", "state", "step", "last_seen_at")
    list_filter = ("state", "mode")
    search_fields = ("uid", "name")


@admin.register(Command)
class CommandAdmin(ReadOnlyAdmin):
    list_display = ("run", "seq", "kind", "state", "issued_at", "acknowledged_at")
    list_filter = ("kind", "state")
    search_fields = ("adaptation_uid",)
