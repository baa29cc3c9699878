"""Adaptations that wait for a person: one query for the badge, the inbox and the overview."""

from __future__ import annotations

from django.db.models import F, Q, QuerySet
from django.utils import timezone

from apps.adaptations.models import Adaptation
from esper.contracts import AdaptationState


def waiting() -> QuerySet[Adaptation]:
    """Adaptations that wait for a person and have not expired; the next to expire comes first."""
    return Adaptation.objects.filter(
        Q(deadline_at__isnull=True) | Q(deadline_at__gt=timezone.now()),
        state=AdaptationState.AWAITING_APPROVAL,
    ).order_by(F("deadline_at").asc(nulls_last=True), "id")


def inbox_count() -> int:
    return waiting().count()
