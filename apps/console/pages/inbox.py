"""The approval inbox: adaptations that wait for a person, and the decisions of persons."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.translation import gettext as _

from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.adaptations.models import Adaptation, Plan
from apps.adaptations.selectors import snoozed_by
from apps.console.panels import Panel, render_page
from apps.console.request import choice, page, person, project_choices
from apps.console.run_rows import live_runs
from apps.console.waiting import waiting
from apps.rest.filters import of_run
from apps.runs.models import Run
from apps.runs.selectors import HUGE_COLUMNS_OF_RUN
from esper.contracts import AdaptationState, Risk, Role

HISTORY_LENGTH = 100


class InboxTab(StrEnum):
    PENDING = "pending"
    CLAIMED = "claimed"
    MINE = "mine"
    SNOOZED = "snoozed"
    HISTORY = "history"


# Where what is listed can be rejected; the others explain themselves on their page.
LIVE_TABS = (InboxTab.PENDING, InboxTab.CLAIMED, InboxTab.MINE)


@dataclass(frozen=True, slots=True)
class InboxFilter:
    tab: InboxTab = InboxTab.PENDING
    run: str = ""
    risk: str = ""
    project: str = ""


@page
def inbox(request: HttpRequest) -> HttpResponse:
    user = person(request)
    chosen = InboxFilter(
        tab=InboxTab(choice(request, "state", InboxTab, InboxTab.PENDING)),
        run=request.GET.get("run", ""),
        risk=choice(request, "risk", Risk),
        project=request.GET.get("project", ""),
    )

    def rows() -> dict[str, Any]:
        found = inbox_rows(chosen, user)
        alone, plans = in_plans(found) if chosen.tab is not InboxTab.HISTORY else (found, {})
        live = found if chosen.tab in LIVE_TABS else []
        rejects = {row.uid: may(user, Act.REJECT, of=row.run) for row in live}
        picks = {uid for uid, one in rejects.items() if one.allowed}
        refused = [one.why for one in rejects.values() if not one.allowed]
        return {
            "rows": alone,
            "plans": plans,
            "picks": picks,
            "why_not": refused[0] if refused and not picks else "",
            "last": None if found else last_decided(),
        }

    panels = [
        Panel(
            "tabs",
            _("Filters"),
            "console/inbox/tabs.html",
            lambda: {"counts": tab_counts(user), "tabs": list(InboxTab)},
            ("adaptation",),
            every=30,
        ),
        Panel("list", _("Decisions"), "console/inbox/list.html", rows, ("adaptation",), every=30),
    ]
    return render_page(
        request,
        "console/inbox.html",
        title=_("Inbox"),
        panels=panels,
        chosen=chosen,
        # Hidden until a row is picked, which only those who may reject it can do.
        bulk=chosen.tab in LIVE_TABS and set(user.access.roles.values()) != {Role.VIEWER},
        whole=lambda: {
            "run_names": run_names(chosen.run),
            "risks": list(Risk),
            "projects": project_choices(user),
        },
    )


def run_names(chosen: str) -> list[tuple[str, str]]:
    """The choices of the run filter: live runs, and the chosen one whatever its state."""
    names = list(live_runs().values_list("uid", "name"))
    if chosen and all(chosen not in choice for choice in names):
        others = Run.objects.filter(Q(uid=chosen) | Q(name=chosen)).values_list("uid", "name")[:1]
        names += list(others) or [(chosen, chosen)]
    return names


def inbox_rows(chosen: InboxFilter, user: User) -> list[Adaptation]:
    """The rows of one tab."""
    rows = _tab(chosen.tab, user).select_related(
        "run__owner",
        "blueprint",
        "claimed_by",
        "assigned_to",
        "escalated_by",
        "decided_by",
        "proposed_by",
        "safety_policy",
        "plan",
    )
    if chosen.run:
        rows = rows.filter(of_run(chosen.run))
    if chosen.project:
        rows = rows.filter(run__project__uid=chosen.project)
    if chosen.risk:
        rows = rows.filter(risk=chosen.risk)
    return list(rows.defer(*HUGE_COLUMNS_OF_RUN)[:HISTORY_LENGTH])


def in_plans(rows: list[Adaptation]) -> tuple[list[Adaptation], dict[Plan, list[Adaptation]]]:
    """What is decided on by itself, and the plans with their members."""
    plans: dict[Plan, list[Adaptation]] = {}
    for row in rows:
        if row.plan is not None:
            plans.setdefault(row.plan, []).append(row)
    return [row for row in rows if row.plan is None], plans


def _tab(tab: InboxTab, user: User) -> QuerySet[Adaptation]:
    match tab:
        case InboxTab.PENDING:
            return waiting(user)
        case InboxTab.CLAIMED:
            return waiting(user).filter(claimed_until__gt=timezone.now())
        case InboxTab.MINE:
            claimed = Q(claimed_by=user, claimed_until__gt=timezone.now())
            return waiting(user).filter(claimed | Q(assigned_to=user))
        case InboxTab.SNOOZED:
            return snoozed_by(user)
        case InboxTab.HISTORY:
            asked = ~Q(asks=[])
            return Adaptation.objects.filter(asked).exclude(state=AdaptationState.AWAITING_APPROVAL)


def tab_counts(user: User) -> dict[str, int]:
    """How many rows the live tabs have."""
    found = waiting(user).values_list("plan_id", "claimed_by_id", "claimed_until", "assigned_to_id")
    rows = [(who, until, whose) for plan, who, until, whose in found if not plan]
    plans = {plan for plan, *_ in found if plan}
    now = timezone.now()
    holders = [who if until is not None and until > now else None for who, until, _ in rows]
    assigned = [who for *_, who in rows]
    return {
        InboxTab.PENDING: len(rows) + len(plans),
        InboxTab.CLAIMED: sum(1 for who in holders if who is not None),
        InboxTab.MINE: sum(1 for who in zip(holders, assigned, strict=True) if user.pk in who),
        InboxTab.SNOOZED: snoozed_by(user).count(),
    }


def last_decided() -> Adaptation | None:
    """The newest decision, for the empty inbox."""
    return (
        Adaptation.objects.exclude(decided_at=None)
        .select_related("decided_by")
        .order_by("-decided_at")
        .first()
    )
