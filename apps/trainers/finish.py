"""A trainer reports that its run has finished or failed."""

from __future__ import annotations

from django.db import transaction

from apps.accounts.actors import Actor
from apps.adaptations.services import close_open_adaptations
from apps.runs.models import Run
from apps.runs.services import check_epoch, lock_run, set_state
from esper.contracts import RunState


@transaction.atomic
def finish_run(
    *, run: Run, epoch: int, state: RunState, step: int, reason: str, actor: Actor
) -> Run:
    """End a run as its trainer reports it, and every open adaptation with it.

    Raises:
        Problem: the run has a newer epoch, or has ended.
    """
    run = lock_run(run.pk)  # it may have changed since the request arrived
    check_epoch(run, epoch)
    set_state(run=run, state=state, actor=actor, reason=reason)
    Run.objects.filter(pk=run.pk).update(step=step)
    close_open_adaptations(run, actor, f"the run has {state}")
    run.refresh_from_db()
    return run
