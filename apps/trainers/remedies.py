"""A training script changed its model by itself: recorded, and followed by its adaptation."""

from __future__ import annotations

from django.db import transaction

from apps.accounts.actors import Actor
from apps.adaptations.models import Adaptation, Remedy
from apps.adaptations.services import adaptation_of, inherited, mark_taken_out, note_merged
from apps.audit.services import record
from apps.notifications.services import publish, run_topic
from apps.rest.numbers import finite_or_none
from apps.runs.models import Run
from apps.runs.services import check_epoch, lock_run, note_taken_back
from esper.contracts import ADAPTATION_ENDED, AdaptationState, RemedyKind
from esper.contracts.protocol import RemedyReport

S = AdaptationState
_TAKES_OUT = frozenset({RemedyKind.PRUNE, RemedyKind.UNDO})
_GONE = ADAPTATION_ENDED - {S.KEPT, S.ROLLBACK_FAILED}


@transaction.atomic
def record_remedy(*, run: Run, report: RemedyReport, actor: Actor) -> Remedy:
    """Record it once, however often it is reported; its adaptation follows.

    Raises:
        Problem: the run has a newer epoch or has ended, or the adaptation is another run's.
    """
    run = lock_run(run.pk)  # it may have changed since the request arrived
    check_epoch(run, report.epoch)
    known = Remedy.objects.filter(run=run, key=report.key).first()
    if known is not None:
        return known
    note_taken_back(run, epoch=report.epoch, after_step=report.back_to_step, up_to_step=report.step)
    adaptation = None
    if report.adaptation and inherited(run, report.adaptation) is None:
        adaptation = adaptation_of(run, report.adaptation)
    undone = Remedy.objects.filter(run=run, key=report.undoes, undone_by=None).first()
    remedy = Remedy.objects.create(
        run=run,
        run_epoch=report.epoch,
        key=report.key,
        kind=report.remedy,
        layer=report.layer,
        step=report.step,
        details=report.details,
        pause_ms=finite_or_none(report.pause_ms),
        digest_before=report.digest_before,
        digest_after=report.digest_after,
        exact=report.exact,
        adaptation=adaptation,
        undoes=undone,
    )
    _follow(remedy, actor)
    _announce(remedy, actor)
    return remedy


def _follow(remedy: Remedy, actor: Actor) -> None:
    """Update the adaptation whose graft was merged, unmerged or taken out."""
    adaptation = remedy.adaptation
    if remedy.undoes is not None:
        if remedy.undoes.kind == RemedyKind.MERGE and remedy.undoes.adaptation is not None:
            note_merged(remedy.undoes.adaptation, merged=False)
    elif adaptation is None:
        return
    elif remedy.kind == RemedyKind.MERGE:
        note_merged(adaptation, merged=True)
    elif remedy.kind in _TAKES_OUT and adaptation.state not in _GONE:
        _taken_out(adaptation, remedy, actor)


def _taken_out(adaptation: Adaptation, remedy: Remedy, actor: Actor) -> None:
    older = str(remedy.details.get("along_with", ""))
    what = f"it went with the hard undo of {older}" if older else "the training script took it out"
    reason = f"{what} at step {remedy.step}"
    mark_taken_out(adaptation, actor, step=remedy.step, reason=reason, exact=remedy.exact)


def _announce(remedy: Remedy, actor: Actor) -> None:
    data = {
        "remedy": remedy.uid,
        "kind": str(remedy.kind),
        "layer": remedy.layer,
        "step": remedy.step,
        "adaptation": remedy.adaptation.uid if remedy.adaptation else "",
        "undoes": remedy.undoes.uid if remedy.undoes else "",
        "digest_before": remedy.digest_before,
        "digest_after": remedy.digest_after,
        "by": actor.name,
    }
    record(
        actor=actor,
        act=f"remedy.{remedy.kind}",
        object_kind="remedy",
        object_uid=remedy.uid,
        run_uid=remedy.run.uid,
        data={**data, "details": remedy.details},
    )
    publish(topic=run_topic(remedy.run.uid), type=f"remedy.{remedy.kind}", data=data)
