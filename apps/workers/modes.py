"""What workers may do: people decide it, and repeated crashes of builders do.

A worker that is not active takes no job, even when it gets a message.
"""

from __future__ import annotations

from django.conf import settings
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from apps.accounts.actors import SYSTEM, Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.audit.services import record
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.rest.problems import Problem
from apps.workers.models import Worker
from esper.contracts import WorkerKind, WorkerMode


def may_take_jobs(name: str) -> bool:
    """False while the worker is draining or in quarantine."""
    return not Worker.objects.filter(name=name).exclude(mode=WorkerMode.ACTIVE).exists()


def is_quarantined(name: str) -> bool:
    return Worker.objects.filter(name=name, mode=WorkerMode.QUARANTINED).exists()


@transaction.atomic
def set_worker_mode(
    *, worker: Worker, mode: WorkerMode, user: User, via: str, reason: str
) -> Worker:
    """Drain a worker, put it into quarantine, or release it.

    Raises:
        Problem: not allowed, no reason for stopping it, or no compile worker.
    """
    permission = may(user, Act.MANAGE_WORKERS)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)
    if worker.kind != WorkerKind.COMPILE:
        raise Problem(409, "not-a-compile-worker", f"{worker.name} takes no compile jobs.")
    if mode != WorkerMode.ACTIVE and not reason.strip():
        raise Problem(422, "reason-required", "Say why this worker must not take jobs.")
    _change_mode(worker, mode, Actor.person(user, via=via), reason.strip())
    return worker


def note_lost_builder(name: str) -> None:
    """Count a crashed builder of this worker; too many in a row quarantine the worker."""
    Worker.objects.filter(name=name).update(crashes=F("crashes") + 1)
    with transaction.atomic():
        worker = (
            Worker.objects.select_for_update()
            .filter(name=name, crashes__gte=settings.ESPER_WORKER_CRASHES_MAX)
            .exclude(mode=WorkerMode.QUARANTINED)
            .first()
        )
        if worker is not None:
            reason = f"{worker.crashes} builders were lost in a row"
            _change_mode(worker, WorkerMode.QUARANTINED, SYSTEM, reason)


def note_good_build(name: str) -> None:
    """A build has succeeded: the count of crashes in a row starts from zero."""
    Worker.objects.filter(name=name, crashes__gt=0).update(crashes=0)


_ACTS = {
    WorkerMode.ACTIVE: "worker.released",
    WorkerMode.DRAINING: "worker.drained",
    WorkerMode.QUARANTINED: "worker.quarantined",
}


def _change_mode(worker: Worker, mode: WorkerMode, actor: Actor, reason: str) -> None:
    before = worker.mode
    released = {"crashes": 0} if mode == WorkerMode.ACTIVE else {}
    Worker.objects.filter(pk=worker.pk).update(
        mode=mode, mode_reason=reason, mode_by=actor.name, mode_at=timezone.now(), **released
    )
    worker.refresh_from_db()
    record(
        actor=actor,
        act=_ACTS[mode],
        object_kind="worker",
        object_uid=worker.name,
        reason=reason,
        data={"from": before, "to": str(mode)},
    )
    publish(topic=SYSTEM_TOPIC, type=_ACTS[mode], data={"worker": worker.name, "reason": reason})
