"""The audit log, read-only; the database itself refuses changes."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.audit.models import AuditEvent


@admin.register(AuditEvent)
class AuditEventAdmin(ReadOnlyAdmin):
    page = ("audit",)
    list_display = ("id", "at", "actor", "act", "object_uid", "run_uid")
    list_filter = ("actor_kind",)
    search_fields = ("object_uid", "actor", "act")
