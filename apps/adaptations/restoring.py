"""After a backup was restored: trainers have gone on, and the database does not know how far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.db import transaction

from apps.accounts.actors import Actor
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.adaptations.reconciliation import locked_adaptations, put_in_doubt
from apps.audit.services import record
from apps.runs.models import Run
from apps.runs.services import lock_run, mark_restored, raise_command_seq
from apps.workers.services import cancel_job
from esper.contracts import AdaptationState

S = AdaptationState
_REASON = "the database was restored from a backup"
_NOT_SENT = (S.AWAITING_APPROVAL, S.COMPILE_QUEUED, S.COMPILING, S.COMPILED)


@dataclass(frozen=True, slots=True)
class Restored:
    """How much a restored database does not know."""

    live_runs: int
    in_doubt: int
    cancelled: int


def note_restored(*, actor: Actor, former_heads: Sequence[str] = ()) -> Restored:
    """The database was restored. ``former_heads``: files that prove what the replaced log had."""
    with transaction.atomic():
        record(
            actor=actor,
            act="installation.restored",
            object_kind="installation",
            object_uid="database",
            reason=_REASON,
            data={"former_heads": list(former_heads)},
        )
    return register_again(actor=actor, reason=_REASON)


def note_replaced_key(name: str, *, actor: Actor) -> Restored:
    """A key that trainers check signatures with was replaced; they learn the new one so."""
    reason = f"the {name} key was replaced"
    with transaction.atomic():
        record(
            actor=actor,
            act="installation.key_replaced",
            object_kind="installation",
            object_uid=name,
            reason=reason,
        )
    return register_again(actor=actor, reason=reason)


def register_again(*, actor: Actor, reason: str) -> Restored:
    """Make every trainer register again and report what its model holds.

    The epochs of all runs are raised, so that no command from before is taken again. What was with
    a trainer is in doubt until that trainer reports; what waited is cancelled, because it may have
    been decided in a time that is lost.
    """
    live = in_doubt = cancelled = 0
    for pk in Run.objects.order_by("id").values_list("pk", flat=True):
        with transaction.atomic():
            run = lock_run(pk)
            doubtful, ended = _begin_again(run, actor, reason)
        live += not run.ended
        in_doubt += len(doubtful)
        cancelled += len(ended)
    return Restored(live, in_doubt, cancelled)


def note_lost_commands(run: Run, *, after: int, actor: Actor) -> None:
    """A trainer names a command that this database has never issued: it is an older backup."""
    with transaction.atomic():
        run = lock_run(run.pk)  # it may have registered again since the request arrived
        if run.restored_at is not None or after <= run.command_seq:
            return
        raise_command_seq(run, after)
        _begin_again(run, actor, _REASON)


def _begin_again(run: Run, actor: Actor, reason: str) -> tuple[list[Adaptation], list[Adaptation]]:
    """What is in doubt, and what was cancelled."""
    mark_restored(run, actor=actor, reason=reason)
    if run.ended:
        return [], []
    waiting = locked_adaptations(run, _NOT_SENT)
    for adaptation in waiting:
        if adaptation.job is not None:
            cancel_job(adaptation.job)
        transition(adaptation, S.CANCELLED, actor=actor, reason=reason)
    return put_in_doubt(run, actor, reason), waiting
