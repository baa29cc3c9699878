"""Adaptations that wait for a person: one query for the badge, the inbox and the overview."""

from __future__ import annotations

from django.db.models import QuerySet

from apps.adaptations.models import Adaptation
from apps.adaptations.selectors import waiting_for_a_person


def waiting() -> QuerySet[Adaptation]:
    """Adaptations that wait for a person and have not expired; the next to expire comes first."""
    return waiting_for_a_person()


def inbox_count() -> int:
    return waiting().count()
