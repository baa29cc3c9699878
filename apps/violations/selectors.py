"""Reading what is wrong with a run."""

from __future__ import annotations

from apps.runs.models import Run
from apps.violations.models import Violation
from esper.contracts import Finding, Severity, ViolationRule


def open_findings(run: Run) -> tuple[Finding, ...]:
    """Findings of the diagnosis that are not over, oldest first, acknowledged ones too."""
    rows = Violation.objects.filter(run=run, resolved_step=None).exclude(finding="").order_by("id")
    return tuple(map(_finding, rows))


def _finding(violation: Violation) -> Finding:
    return Finding(
        rule=ViolationRule(violation.rule),
        layer=violation.layer,
        severity=Severity(violation.severity),
        observed=violation.observed,
        limit=violation.limit,
        remedy=violation.action,
        slug=violation.finding,
        since_step=-1 if violation.since_step is None else violation.since_step,
    )
