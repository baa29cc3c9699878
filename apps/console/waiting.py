"""Adaptations that wait for a person: one query for the badge, the inbox and the overview."""

from __future__ import annotations

from django.db.models import QuerySet

from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from apps.adaptations.selectors import in_inbox_of


def waiting(user: User) -> QuerySet[Adaptation]:
    """What waits and is not snoozed by this person; the next to expire comes first."""
    return in_inbox_of(user)


def inbox_count(user: User) -> int:
    return waiting(user).count()
