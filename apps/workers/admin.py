"""Workers and jobs, to look at."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.workers.models import CompileJob, Worker


@admin.register(CompileJob)
class CompileJobAdmin(ReadOnlyAdmin):
    list_display = ("uid", "blueprint_slug", "state", "attempt", "lease_owner", "queued_at")
    list_filter = ("state",)
    search_fields = ("uid", "adaptation_uid")


@admin.register(Worker)
class WorkerAdmin(ReadOnlyAdmin):
    page = ("workers",)
    list_display = ("name", "kind", "host", "state", "mode", "heartbeat_at")
    list_filter = ("kind", "state", "mode")
