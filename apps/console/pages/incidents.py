"""What is wrong in which run, since when, and what would help: findings and violations by cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import Prefetch, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.accounts.models import User
from apps.accounts.policy import Act, Permission, may
from apps.adaptations.models import Adaptation
from apps.blueprints.models import KnownRemedy
from apps.console.panels import Panel, render_page
from apps.console.request import choice, page, person, project_choices
from apps.rest.filters import of_run
from apps.runs.models import Run
from apps.runs.selectors import HUGE_COLUMNS
from apps.violations.models import Violation
from apps.violations.selectors import RECORDS_READ, Incident, IncidentState, incidents
from esper.contracts import ADAPTATION_ENDED, AdaptationState, RunMode, Severity

INCIDENTS_SHOWN = 100
REPEATS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class IncidentFilter:
    state: IncidentState = IncidentState.OPEN
    severity: str = ""
    run: str = ""
    project: str = ""


@dataclass(frozen=True, slots=True)
class IncidentCard:
    """An incident with what answers it.

    Attributes:
        answers: adaptations for its finding that are not over, the newest first.
        helps: remedies that the person can ask for, in the order in which to try them.
        may_acknowledge: whether the person may; with the reason if not.
    """

    incident: Incident
    answers: Sequence[Adaptation]
    helps: Sequence[KnownRemedy]
    may_acknowledge: Permission

    @property
    def repeats(self) -> tuple[Violation, ...]:
        return self.incident.records[1 : REPEATS_SHOWN + 1]

    @property
    def waits(self) -> bool:
        """A person has to decide on one of the answers."""
        return any(row.state == AdaptationState.AWAITING_APPROVAL for row in self.answers)


@page
def incidents_page(request: HttpRequest) -> HttpResponse:
    user = person(request)
    chosen = IncidentFilter(
        state=IncidentState(choice(request, "state", IncidentState, IncidentState.OPEN)),
        severity=choice(request, "severity", Severity),
        run=request.GET.get("run", ""),
        project=request.GET.get("project", ""),
    )

    def shown() -> dict[str, Any]:
        found = chosen_incidents(chosen)
        return {
            "cards": cards([one for one in found if one.state == chosen.state], user),
            "counts": Counter(one.state for one in found),
            "states": list(IncidentState),
        }

    panels = [
        Panel(
            "list",
            _("Incidents"),
            "console/incidents/list.html",
            shown,
            ("violation", "adaptation"),
            every=30,
        )
    ]
    return render_page(
        request,
        "console/incidents.html",
        title=_("Incidents"),
        panels=panels,
        chosen=chosen,
        severities=list(Severity),
        whole=lambda: {"projects": project_choices(user)},
    )


def chosen_incidents(chosen: IncidentFilter) -> list[Incident]:
    """All incidents that match, in every state; made of the newest records."""
    # Not by a join: many records are of one run, which would be made again for each of them.
    of_runs = Prefetch("run", Run.objects.defer(*HUGE_COLUMNS))
    rows: QuerySet[Violation] = Violation.objects.prefetch_related(of_runs, "acknowledged_by")
    if chosen.run:
        rows = rows.filter(of_run(chosen.run))
    if chosen.project:
        rows = rows.filter(run__project__uid=chosen.project)
    found = incidents(rows.order_by("-id")[:RECORDS_READ])
    return [one for one in found if chosen.severity in ("", one.severity)]


def cards(found: Sequence[Incident], user: User) -> list[IncidentCard]:
    found = found[:INCIDENTS_SHOWN]
    known = {remedy.slug: remedy for remedy in KnownRemedy.objects.filter(present=True)}
    answers: dict[tuple[int, str], list[Adaptation]] = {}
    open_ones = Adaptation.objects.exclude(state__in=ADAPTATION_ENDED).exclude(finding="")
    runs = {one.newest.run_id for one in found}
    for row in open_ones.filter(run__in=runs).select_related("blueprint").order_by("-id"):
        answers.setdefault((row.run_id, row.finding), []).append(row)
    return [
        IncidentCard(
            incident=one,
            answers=answers.get((one.newest.run_id or 0, one.newest.finding), ()),
            helps=_helps(one, known, user),
            may_acknowledge=may(user, Act.ACKNOWLEDGE_VIOLATION, of=one.run),
        )
        for one in found
    ]


def _helps(one: Incident, known: dict[str, KnownRemedy], user: User) -> list[KnownRemedy]:
    """Nothing can be asked for in a run that has ended, or that is only observed."""
    run = one.run
    if run is None or run.ended or run.mode == RunMode.OBSERVE or one.state != IncidentState.OPEN:
        return []
    if not may(user, Act.PROPOSE_REMEDY, of=run).allowed:
        return []
    return [known[slug] for slug in one.remedies if slug in known]
