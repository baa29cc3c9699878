"""Workers: what they say of themselves, and what they may do.

``state`` comes from heartbeats; ``mode`` is decided by people, or by the pool where a worker's
builders crash again and again. A worker that is not active takes no job, whatever bell it hears.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from apps.accounts.actors import SYSTEM, Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.audit.services import record
from apps.kernels.models import CompileJob, Worker
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.rest.problems import Problem
from esper.contracts import JobState, WorkerKind, WorkerMode, WorkerState

FORGET_WORKERS_AFTER = timedelta(hours=1)
_GONE = (WorkerState.STOPPING, WorkerState.OFFLINE)


@dataclass(frozen=True, slots=True)
class Presence:
    """What a worker says of itself. None: whoever reports does not know it, another one does.

    The process that answers Celery knows the queues; the one that builds knows the devices.
    """

    name: str
    kind: WorkerKind
    host: str
    started_at: datetime
    capabilities: list[str] | None = None
    queues: list[str] | None = None
    devices: list[dict[str, Any]] | None = None
    versions: dict[str, str] | None = None
    memory_free_mib: int | None = None
    memory_total_mib: int | None = None
    stopping: bool = False


def heartbeat(presence: Presence) -> WorkerMode:
    """Note that a worker lives; returns what it may do."""
    told = {
        name: getattr(presence, name)
        for name in (
            *("capabilities", "queues", "devices", "versions"),
            *("memory_free_mib", "memory_total_mib"),
        )
    }
    worker, _ = Worker.objects.update_or_create(
        name=presence.name,
        defaults={
            "kind": presence.kind,
            "host": presence.host,
            "started_at": presence.started_at,
            "heartbeat_at": timezone.now(),
            "state": _state(presence),
            **{name: value for name, value in told.items() if value is not None},
        },
    )
    return WorkerMode(worker.mode)


def say_goodbye(name: str) -> None:
    """A worker has ended in order; nobody needs to wait for its heartbeat to be missed."""
    Worker.objects.filter(name=name).update(state=WorkerState.OFFLINE)


def _state(presence: Presence) -> WorkerState:
    if presence.stopping:
        return WorkerState.STOPPING
    busy = CompileJob.objects.filter(state=JobState.RUNNING, lease_owner=presence.name).exists()
    return WorkerState.BUSY if busy else WorkerState.IDLE


def mark_offline_workers() -> int:
    """Workers without a heartbeat for three periods; returns how many went away."""
    forgotten = timezone.now() - FORGET_WORKERS_AFTER
    # A quarantine must not end because nobody looked for an hour.
    Worker.objects.filter(heartbeat_at__lt=forgotten, mode=WorkerMode.ACTIVE).delete()
    limit = timezone.now() - timedelta(seconds=3 * settings.ESPER_WORKER_HEARTBEAT_SECONDS)
    return (
        Worker.objects.filter(heartbeat_at__lt=limit)
        .exclude(state=WorkerState.OFFLINE)
        .update(state=WorkerState.OFFLINE)
    )


def queue_is_served(queue: str) -> bool:
    """Does a living worker that takes work listen to this queue?"""
    return queue in served_queues()


def served_queues() -> frozenset[str]:
    """All queues with a living worker that takes work."""
    taking = Worker.objects.filter(mode=WorkerMode.ACTIVE).exclude(state__in=_GONE)
    return frozenset(
        queue for queues in taking.values_list("queues", flat=True) for queue in queues
    )


def may_take_jobs(name: str) -> bool:
    """False while it is draining or in quarantine."""
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
    """A builder of this worker was lost; too many in a row, and the worker is in quarantine."""
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
    """The row of crashes has ended."""
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
