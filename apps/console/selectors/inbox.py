"""The approval inbox. Its badge counts what ``waiting`` lists, so the two cannot disagree."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from django.db.models import F, Q, QuerySet
from django.utils import timezone

from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from esper.contracts import AdaptationState

HISTORY_LENGTH = 100


class InboxTab(StrEnum):
    PENDING = "pending"
    CLAIMED = "claimed"
    MINE = "mine"
    HISTORY = "history"


@dataclass(frozen=True, slots=True)
class InboxFilter:
    tab: InboxTab = InboxTab.PENDING
    run: str = ""
    risk: str = ""


def waiting() -> QuerySet[Adaptation]:
    """What waits for a person and has not run out, the first to expire first."""
    return Adaptation.objects.filter(
        Q(deadline_at__isnull=True) | Q(deadline_at__gt=timezone.now()),
        state=AdaptationState.AWAITING_APPROVAL,
    ).order_by(F("deadline_at").asc(nulls_last=True), "id")


def inbox_count() -> int:
    return waiting().count()


def inbox(chosen: InboxFilter, user: User) -> list[Adaptation]:
    """The rows of one tab."""
    rows = _tab(chosen.tab, user).select_related(
        "run__owner", "blueprint", "claimed_by", "decided_by", "safety_policy"
    )
    if chosen.run:
        rows = rows.filter(run__uid=chosen.run)
    if chosen.risk:
        rows = rows.filter(risk=chosen.risk)
    return list(rows[:HISTORY_LENGTH])


def _tab(tab: InboxTab, user: User) -> QuerySet[Adaptation]:
    match tab:
        case InboxTab.PENDING:
            return waiting()
        case InboxTab.CLAIMED:
            return waiting().filter(claimed_until__gt=timezone.now())
        case InboxTab.MINE:
            return waiting().filter(claimed_by=user, claimed_until__gt=timezone.now())
        case InboxTab.HISTORY:
            asked = ~Q(asks=[])
            return Adaptation.objects.filter(asked).exclude(
                state__in=(
                    AdaptationState.PROPOSED,
                    AdaptationState.VALIDATING,
                    AdaptationState.AWAITING_APPROVAL,
                )
            )


def tab_counts(user: User) -> dict[str, int]:
    """How many rows the live tabs have."""
    rows = list(waiting().values_list("claimed_by_id", "claimed_until"))
    now = timezone.now()
    claimed = [who for who, until in rows if until is not None and until > now]
    return {
        InboxTab.PENDING: len(rows),
        InboxTab.CLAIMED: len(claimed),
        InboxTab.MINE: sum(1 for who in claimed if who == user.pk),
    }


def last_decided() -> Adaptation | None:
    """The newest decision, for the empty inbox."""
    return (
        Adaptation.objects.exclude(decided_at=None)
        .select_related("decided_by")
        .order_by("-decided_at")
        .first()
    )
