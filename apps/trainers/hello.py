"""After registering, a trainer reports the grafts that its model holds."""

from __future__ import annotations

from collections.abc import Sequence

from django.db import transaction

from apps.accounts.actors import Actor
from apps.adaptations.models import Adaptation
from apps.adaptations.services import reconcile_grafts
from apps.runs.models import Run
from apps.runs.services import check_epoch, lock_run, raise_command_seq, set_state
from esper.contracts import RunState
from esper.contracts.protocol import Applied


@transaction.atomic
def settle_hello(
    *,
    run: Run,
    epoch: int,
    step: int,
    applied: Sequence[Applied],
    actor: Actor,
    last_command_seq: int = 0,
) -> list[Adaptation]:
    """Settle the adaptations in doubt by the reported grafts; returns those that were settled.

    Raises:
        Problem: the run has a newer epoch, or has ended.
    """
    run = lock_run(run.pk)  # it may have changed since the request arrived
    check_epoch(run, epoch)
    raise_command_seq(run, last_command_seq)
    reported = {entry.adaptation: entry for entry in applied if entry.adaptation}
    settled = reconcile_grafts(run, reported, actor)
    if run.state in (RunState.STARTING, RunState.UNREACHABLE):
        set_state(run=run, state=RunState.RUNNING, actor=actor)
    if run.restored_at is not None:
        Run.objects.filter(pk=run.pk).update(restored_at=None)
    return settled
