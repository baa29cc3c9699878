"""A trainer's guard took a graft out by itself, without asking the server."""

from __future__ import annotations

from django.db import transaction

from apps.accounts.actors import Actor
from apps.adaptations.models import Adaptation
from apps.adaptations.services import adaptation_of, inherited, mark_taken_out
from apps.runs.models import Run
from apps.runs.services import check_epoch, lock_run, note_taken_back
from apps.violations.services import record_violation
from esper.contracts import AdaptationState, Severity
from esper.contracts.protocol import Reading, Rollback

_OUT = (AdaptationState.ROLLED_BACK, AdaptationState.REVERTED)


@transaction.atomic
def record_local_rollback(*, run: Run, report: Rollback, actor: Actor) -> Adaptation:
    """Record that the trainer's guard took a graft out.

    Raises:
        Problem: the run has a newer epoch or has ended, or the adaptation is not grafted.
    """
    run = lock_run(run.pk)  # it may have changed since the request arrived
    check_epoch(run, report.epoch)
    note_taken_back(run, epoch=report.epoch, after_step=report.back_to_step, up_to_step=report.step)
    of_parent = inherited(run, report.adaptation)
    adaptation = of_parent or adaptation_of(run, report.adaptation)
    if of_parent is None and adaptation.state in _OUT:
        return adaptation  # reported before
    observed, limit = _words(report.observed), _words(report.limit)
    record_violation(
        run=run,
        rule=report.rule,
        severity=Severity.SERIOUS,
        observed=observed,
        limit=limit,
        text=f"{adaptation.layer}: {report.rule.replace('_', ' ')} after the graft.",
        action=f"The trainer took the graft out by itself at step {report.step}.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
        step=report.step,
    )
    if of_parent is not None:  # the other run still has it
        return adaptation
    mark_taken_out(
        adaptation,
        actor,
        step=report.step,
        reason=f"{report.rule}: {observed} (limit {limit})",
        exact=report.exact,
    )
    return adaptation


def _words(reading: Reading) -> str:
    return reading if isinstance(reading, str) else f"{reading:.6g}"
