"""Writing violations, and a person's acknowledgement of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from django.db import transaction
from django.utils import timezone

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.audit.services import record
from apps.notifications.services import SYSTEM_TOPIC, publish, run_topic
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.runs.services import lock_run
from apps.violations.models import Violation
from esper.contracts import Finding, Severity, ViolationRule

MAX_OPEN_FINDINGS_PER_RUN = 200
MAX_FINDING_TEXT = 500
MAX_SLUG = 64


@transaction.atomic
def record_violation(
    *,
    run: Run | None,
    rule: ViolationRule,
    severity: Severity,
    observed: str,
    limit: str,
    text: str,
    action: str,
    advice: str = "",
    layer: str = "",
    adaptation_uid: str = "",
    step: int | None = None,
    finding: str = "",
    since_step: int | None = None,
    remedies: Sequence[str] = (),
) -> Violation:
    """Record a broken limit, what the system did about it, and what a person can do."""
    if run is not None:
        lock_run(run.pk)
    violation = Violation.objects.create(
        run=run,
        rule=rule,
        severity=severity,
        observed=observed[:200],
        limit=limit[:200],
        text=text,
        action=action,
        advice=advice,
        layer=layer,
        adaptation_uid=adaptation_uid,
        step=step,
        finding=finding,
        since_step=since_step,
        remedies=list(remedies),
    )
    _publish_opened(violation)
    return violation


def _publish_opened(violation: Violation) -> None:
    run = violation.run
    data = {
        "violation": violation.uid,
        "number": violation.number,
        "rule": str(violation.rule),
        "severity": str(violation.severity),
        "layer": violation.layer,
        "text": violation.text,
        "action": violation.action,
        "advice": violation.advice,
    }
    if run is not None:
        publish(topic=run_topic(run.uid), type="violation.opened", data=data)
    publish(
        topic=SYSTEM_TOPIC,
        type="violation.opened",
        data={"run": run.uid if run else "", **data},
        project_id=run.project_id if run else None,
    )


@transaction.atomic
def record_findings(*, run: Run, findings: Sequence[Finding]) -> int:
    """Record what a trainer has diagnosed. The same open finding is written once.

    Findings are the same when rule, layer and remedy are, or the rule of the diagnosis; the
    observed number may differ, and is taken anew with another severity. One that is over closes its
    record.
    """
    return sum(_record_finding(run, finding) for finding in findings)


def close_findings(*, run: Run) -> None:
    """Another process goes on with the run: its own diagnosis opens again what still holds.

    Otherwise a finding that nobody looks after would be answered by grafts for ever.
    """
    Violation.objects.filter(
        run=run, rule=ViolationRule.DIAGNOSIS, resolved_step=None, adaptation_uid=""
    ).exclude(finding="").update(resolved_step=run.step)


def _record_finding(run: Run, finding: Finding) -> bool:
    """True where it was written as a new one."""
    observed, limit, remedy = (
        text[:MAX_FINDING_TEXT] for text in (finding.observed, finding.limit, finding.remedy)
    )
    slug, advice = finding.slug[:MAX_SLUG], f"{remedy[:1].upper()}{remedy[1:]}"
    not_over = Violation.objects.filter(run=run, resolved_step=None, adaptation_uid="")
    unseen = not_over.filter(acknowledged_at=None)
    if slug and finding.rule != ViolationRule.OPTIMIZER_LEDGER:
        # Under one rule of the diagnosis there is one finding at a time, until it is over.
        same = not_over.filter(rule=finding.rule, finding=slug)
    else:
        same = unseen.filter(rule=finding.rule, finding=slug, layer=finding.layer, advice=advice)
    if finding.resolved_step >= 0:
        same.update(resolved_step=finding.resolved_step)
        return False
    if slug and same.exclude(severity=finding.severity).update(
        severity=finding.severity, observed=observed[:200], text=_text(run, finding, observed)
    ):
        return False
    if same.exists() or unseen.count() >= MAX_OPEN_FINDINGS_PER_RUN:
        return False
    record_violation(
        run=run,
        rule=finding.rule,
        severity=finding.severity,
        observed=observed,
        limit=limit,
        text=_text(run, finding, observed),
        action="Nothing was changed.",
        advice=advice,
        layer=finding.layer,
        step=run.step,
        finding=slug,
        since_step=finding.since_step if finding.since_step >= 0 else None,
        remedies=finding.remedies,
    )
    return True


def _text(run: Run, finding: Finding, observed: str) -> str:
    """The layer stands before what was observed, unless that names it already."""
    if not finding.layer:
        return f"{run.name}: {observed}"
    named = rf"(?<![\w.]){re.escape(finding.layer)}(?![\w.])"
    if not finding.layer.isdigit() and re.search(named, observed):  # "0" may be a count
        return f"{observed[:1].upper()}{observed[1:]}"
    return f"Layer {finding.layer}: {observed}"


@transaction.atomic
def acknowledge_violation(
    *, violation: Violation, user: User, via: str, reason: str = ""
) -> Violation:
    """Record that a person has seen it; raises ``Problem`` when not allowed or done already."""
    permission = may(user, Act.ACKNOWLEDGE_VIOLATION, of=violation.run)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)
    won = Violation.objects.filter(pk=violation.pk, acknowledged_at=None).update(
        acknowledged_by=user, acknowledged_at=timezone.now(), note=reason
    )
    violation.refresh_from_db()
    if not won:
        who = violation.acknowledged_by
        raise Problem(
            409,
            "already-acknowledged",
            f"{who.get_username() if who else 'Another person'} has acknowledged it already.",
        )
    record(
        actor=Actor.person(user, via=via),
        act="violation.acknowledged",
        object_kind="violation",
        object_uid=violation.uid,
        run_uid=violation.run.uid if violation.run else "",
        reason=reason,
    )
    publish(
        topic=SYSTEM_TOPIC,
        type="violation.acknowledged",
        data={"violation": violation.uid},
        project_id=violation.run.project_id if violation.run else None,
    )
    return violation


def acknowledge_violations(
    *, violations: Sequence[Violation], user: User, via: str, reason: str = ""
) -> list[tuple[Violation, Problem | None]]:
    """Acknowledge several; each by itself, so that one refusal does not stop the others."""
    results: list[tuple[Violation, Problem | None]] = []
    for violation in violations:
        try:
            acknowledge_violation(violation=violation, user=user, via=via, reason=reason)
        except Problem as refused:
            results.append((violation, refused))
        else:
            results.append((violation, None))
    return results
