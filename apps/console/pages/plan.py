"""One plan's page: its changes in order, why these, and the one decision on all of them."""

from __future__ import annotations

from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.accounts.models import User
from apps.adaptations import services as adaptations
from apps.adaptations.models import Adaptation, Plan
from apps.adaptations.selectors import plans
from apps.audit.models import AuditEvent
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.notifications.services import run_topic
from esper.contracts import AdaptationState, PlanState


@page
def plan(request: HttpRequest, uid: str) -> HttpResponse:
    found = plans().select_related("run__owner").filter(uid=uid).first()
    if found is None:
        raise Http404("there is no such plan")
    return render_page(
        request,
        "console/plan.html",
        title=f"P-{found.number}",
        panels=_panels(person(request), found),
        topics=[run_topic(found.run.uid)],
        plan=found,
        run=found.run,
        risk=adaptations.plan_risk(found),
    )


def _panels(user: User, found: Plan) -> list[Panel]:
    events, every = ("plan", "adaptation", "switch", "freeze"), 0 if found.ended else 5
    members = adaptations.members_of(found)

    def part(name: str, title: str, data: dict[str, Any]) -> Panel:
        return Panel(name, title, f"console/plan/{name}.html", lambda: data, events, every)

    return [
        part("head", _("Plan"), {"members": members, "verdict": verdict(found, members)}),
        part(
            "members", _("Changes, in their order"), {"members": members, "total": total(members)}
        ),
        part("reasons", _("Why this plan"), {}),
        part("undo", _("How it is undone"), {"lines": adaptations.plan_undo_text(found)}),
        part("history", _("History"), {"events": history(found)}),
        part("acts", _("Your decision"), acts(found, user)),
    ]


def verdict(found: Plan, members: list[Adaptation]) -> str:
    """Kept or taken back as one; empty before it is applied, and where a person ended it."""
    kept = sum(member.state == AdaptationState.KEPT for member in members)
    match PlanState(found.state):
        case PlanState.APPLIED:
            return _(
                "open; %(kept)s of %(all)s changes have passed their tests. All must, "
                "otherwise all are taken out."
            ) % {"kept": kept, "all": len(members)}
        case PlanState.SETTLED:
            return _("kept.")
        case PlanState.TAKING_BACK | PlanState.TAKEN_BACK:
            return _("taken back.")
        case PlanState.INCOMPLETE:
            return _("taken back, but not all of it could be taken out.")
        case _:
            return ""


def total(members: list[Adaptation]) -> dict[str, float | None]:
    """The sum of each forecast; None where one is unknown."""

    def of(name: str) -> float | None:
        values = [getattr(member, name) for member in members]
        return None if None in values else sum(values)

    return {
        "parameters": of("forecast_parameters"),
        "memory_mib": of("forecast_memory_mib"),
        "latency_ms": of("forecast_latency_ms"),
    }


def history(found: Plan) -> list[AuditEvent]:
    return list(AuditEvent.objects.filter(object_uid=found.uid).order_by("id"))


def acts(found: Plan, user: User) -> dict[str, Any]:
    """Which buttons the person gets, and why the other buttons are missing."""
    answers = adaptations.plan_permissions(found, user)
    refusals = [one for one in answers.values() if not one.allowed]
    whys = [one.why for one in refusals if one.code != "decision-not-pending"]
    return {
        "may": {name: answer.allowed for name, answer in answers.items()},
        "whys": list(dict.fromkeys(whys)),
    }
