"""The list of violations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.core.paginator import Page, Paginator
from django.http import Http404, HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.accounts.policy import Act, may
from apps.console.panels import Panel, render_page
from apps.console.request import choice, page, page_number, person, project_choices
from apps.rest.filters import of_run
from apps.runs.selectors import HUGE_COLUMNS_OF_RUN
from apps.violations.models import Violation
from apps.violations.selectors import open_violations, worst_first
from esper.contracts import Severity, ViolationRule

PAGE_LENGTH = 50
STATES = ("open", "resolved", "acknowledged", "all")


@dataclass(frozen=True, slots=True)
class ViolationFilter:
    state: str = "open"  # one of STATES
    severity: str = ""
    rule: str = ""
    run: str = ""
    project: str = ""


@page
def violations(request: HttpRequest) -> HttpResponse:
    state = request.GET.get("state", "open")
    if state not in STATES:
        raise Http404("there is no such filter")
    chosen = ViolationFilter(
        state=state,
        severity=choice(request, "severity", Severity),
        rule=choice(request, "rule", ViolationRule),
        run=request.GET.get("run", ""),
        project=request.GET.get("project", ""),
    )

    def rows() -> dict[str, Any]:
        found = violation_rows(chosen, page_number(request))
        permissions = {
            row.uid: may(person(request), Act.ACKNOWLEDGE_VIOLATION, of=row.run)
            for row in found.object_list
            if row.acknowledged_at is None
        }
        refused = [one.why for one in permissions.values() if not one.allowed]
        return {
            "page": found,
            "acknowledgeable": {uid for uid, one in permissions.items() if one.allowed},
            "why_not": refused[0] if refused else "",
        }

    panels = [
        Panel(
            "list", _("Violations"), "console/violations/list.html", rows, ("violation",), every=30
        )
    ]
    return render_page(
        request,
        "console/violations.html",
        title=_("Violations"),
        panels=panels,
        chosen=chosen,
        states=STATES,
        severities=list(Severity),
        rules=list(ViolationRule),
        whole=lambda: {"projects": project_choices(person(request))},
    )


def violation_rows(chosen: ViolationFilter, page: int) -> Page[Violation]:
    rows = Violation.objects.all()
    if chosen.state == "open":
        rows = worst_first(open_violations())
    elif chosen.state == "resolved":
        rows = rows.filter(acknowledged_at=None).exclude(resolved_step=None)
    elif chosen.state == "acknowledged":
        rows = rows.exclude(acknowledged_at=None)
    if chosen.severity:
        rows = rows.filter(severity=chosen.severity)
    if chosen.rule:
        rows = rows.filter(rule=chosen.rule)
    if chosen.run:
        rows = rows.filter(of_run(chosen.run))
    if chosen.project:
        rows = rows.filter(run__project__uid=chosen.project)
    rows = rows.select_related("run", "acknowledged_by").defer(*HUGE_COLUMNS_OF_RUN)
    return Paginator(rows, PAGE_LENGTH).get_page(page)
