"""Runs as callers may see them."""

from __future__ import annotations

from django.db.models import QuerySet

from apps.runs.models import Run


def runs(*, only: str = "") -> QuerySet[Run]:
    """All runs; just the one with the uid ``only`` for a caller that is confined to it."""
    rows = Run.objects.select_related("owner")
    return rows.filter(uid=only) if only else rows
