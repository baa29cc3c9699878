"""A run is quarantined while it is unknown, or known to be wrong, what its model holds."""

from __future__ import annotations

from apps.accounts.actors import Actor
from apps.adaptations.models import Adaptation
from apps.audit.services import record
from apps.runs.models import Command, Run
from esper.contracts import AdaptationState, CommandKind


def refresh_quarantine(run: Run, actor: Actor) -> None:
    """Begin or end the quarantine as the run's adaptations have it. In a transaction."""
    reason = _reason(run)
    if reason == run.quarantined_reason:
        return
    Run.objects.filter(pk=run.pk).update(quarantined_reason=reason)
    record(
        actor=actor,
        act="run.quarantined" if reason else "run.released",
        object_kind="run",
        object_uid=run.uid,
        run_uid=run.uid,
        reason=reason or "every change of the run has been settled",
    )


def _reason(run: Run) -> str:
    """Why nothing may be changed; empty when everything is known."""
    adaptations = Adaptation.objects.filter(run=run).order_by("-id")
    failed = adaptations.filter(state=AdaptationState.ROLLBACK_FAILED).first()
    if failed is not None:
        return f"A-{failed.number} could not be taken out: {failed.end_reason}"
    undos = Command.objects.filter(run=run, kind=CommandKind.UNDO).values("adaptation_uid")
    unanswered = adaptations.filter(state=AdaptationState.IN_DOUBT, uid__in=undos).first()
    if unanswered is not None:
        return f"no answer yet whether A-{unanswered.number} was taken out; the trainer is asked"
    return ""
