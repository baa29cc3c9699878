"""Reading what is wrong with a run, and violations in the order in which people look at them."""

from __future__ import annotations

from django.db.models import Case, QuerySet, Value, When

from apps.runs.models import Run
from apps.violations.incidents import RECORDS_READ, Incident, IncidentState, incidents
from apps.violations.models import Violation
from esper.contracts import RUN_ENDED, Finding, Severity, ViolationRule

__all__ = [
    "RECORDS_READ",
    "Incident",
    "IncidentState",
    "incidents",
    "open_findings",
    "open_violations",
    "worst_first",
]


def open_findings(run: Run) -> tuple[Finding, ...]:
    """Findings of the diagnosis that are not over, oldest first, acknowledged ones too."""
    rows = Violation.objects.filter(run=run, resolved_step=None).exclude(finding="").order_by("id")
    return tuple(map(_finding, rows))


def open_violations() -> QuerySet[Violation]:
    """Those that nobody has acknowledged, and that have not ended by themselves."""
    return Violation.objects.filter(acknowledged_at=None, resolved_step=None)


def needing_a_person() -> QuerySet[Violation]:
    """Open ones that are severe, and about which something can still be done: their run goes on."""
    severe = open_violations().filter(severity__in=(Severity.SERIOUS, Severity.CRITICAL))
    return severe.exclude(run__state__in=RUN_ENDED)


def worst_first(rows: QuerySet[Violation]) -> QuerySet[Violation]:
    """The most severe first, the newest first among equals."""
    order = list(Severity)  # mildest first
    rank = Case(*(When(severity=level, then=Value(-place)) for place, level in enumerate(order)))
    return rows.order_by(rank, "-id")


def _finding(violation: Violation) -> Finding:
    return Finding(
        rule=ViolationRule(violation.rule),
        layer=violation.layer,
        severity=Severity(violation.severity),
        observed=violation.observed,
        limit=violation.limit,
        remedy=violation.advice,
        slug=violation.finding,
        since_step=-1 if violation.since_step is None else violation.since_step,
    )
