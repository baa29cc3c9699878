"""Adaptations, to look at: only the lifecycle moves them."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.adaptations.models import Adaptation, Plan, Remedy


@admin.register(Adaptation)
class AdaptationAdmin(ReadOnlyAdmin):
    page = ("adaptation", "uid")
    list_display = (
        "uid",
        "run",
        "layer",
        "blueprint",
        "state",
        "confidence",
        "decided_by",
        "created_at",
    )
    list_filter = ("state", "risk")
    search_fields = ("uid", "layer")
    list_select_related = ("run", "blueprint", "decided_by")


@admin.register(Plan)
class PlanAdmin(ReadOnlyAdmin):
    page = ("plan", "uid")
    list_display = ("uid", "run", "state", "proposed_step", "decided_by", "created_at")
    list_filter = ("state",)
    search_fields = ("uid",)
    list_select_related = ("run", "decided_by")


@admin.register(Remedy)
class RemedyAdmin(ReadOnlyAdmin):
    list_display = ("uid", "run", "kind", "layer", "step", "adaptation", "created_at")
    list_filter = ("kind",)
    search_fields = ("uid", "layer")
    list_select_related = ("run", "adaptation")
