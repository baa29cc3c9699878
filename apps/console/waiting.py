"""What waits for a person: one query for the badge, the inbox and the overview."""

from __future__ import annotations

from django.db.models import Count, Q, QuerySet

from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from apps.adaptations.selectors import in_inbox_of


def waiting(user: User) -> QuerySet[Adaptation]:
    """What waits and is not snoozed by this person; the next to expire comes first."""
    return in_inbox_of(user)


def inbox_count(user: User) -> int:
    """What the inbox lists: a plan counts as one."""
    found = waiting(user).aggregate(
        alone=Count("id", filter=Q(plan=None)), plans=Count("plan", distinct=True)
    )
    return int(found["alone"] + found["plans"])
