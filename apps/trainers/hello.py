"""After registering, a trainer reports the grafts and remedies that its model holds."""

from __future__ import annotations

from collections.abc import Sequence

from django.db import transaction

from apps.accounts.actors import Actor
from apps.adaptations.models import Adaptation
from apps.adaptations.services import reconcile_grafts, reconcile_remedies
from apps.runs.models import Run
from apps.runs.services import check_epoch, lock_run, raise_command_seq, set_state
from esper.contracts import RunState
from esper.contracts.protocol import Applied, HeldRemedy


@transaction.atomic
def settle_hello(
    *,
    run: Run,
    epoch: int,
    step: int,
    applied: Sequence[Applied],
    actor: Actor,
    remedies: Sequence[HeldRemedy] = (),
    last_command_seq: int = 0,
) -> list[Adaptation]:
    """Settle the adaptations in doubt by what is reported; returns those that were settled.

    Raises:
        Problem: the run has a newer epoch, or has ended.
    """
    run = lock_run(run.pk)  # it may have changed since the request arrived
    check_epoch(run, epoch)
    raise_command_seq(run, last_command_seq)
    reported = {entry.adaptation: entry for entry in applied if entry.adaptation}
    settled = reconcile_grafts(run, reported, actor)
    held = {entry.adaptation: entry for entry in remedies}
    settled += reconcile_remedies(run, held, step, actor)
    if run.state in (RunState.STARTING, RunState.UNREACHABLE):
        set_state(run=run, state=RunState.RUNNING, actor=actor)
    if run.restored_at is not None:
        Run.objects.filter(pk=run.pk).update(restored_at=None)
    return settled
