"""What workers report about themselves; ``Worker.state`` follows from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db.models import Max

from apps.rest.clock import now as database_now
from apps.workers.models import CompileJob, Worker
from esper.contracts import JobState, WorkerKind, WorkerMode, WorkerState

FORGET_WORKERS_AFTER = timedelta(hours=1)


def worker_name() -> str:
    """``compile@host``: the name under which this process takes leases."""
    return os.environ.get("ESPER_WORKER_NAME", f"worker-{os.getpid()}@{settings.ESPER_HOST_NAME}")


@dataclass(frozen=True, slots=True)
class Presence:
    """What a worker reports. None: the reporting process does not know it, another one does.

    The process that consumes Celery's queues knows the queues; the one that builds knows the
    devices.
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
    """Record that a worker is alive; return what it may do."""
    reported = {
        name: getattr(presence, name)
        for name in (
            *("capabilities", "queues", "devices", "versions"),
            *("memory_free_mib", "memory_total_mib"),
        )
    }
    _forget_earlier_process(presence)
    worker, _ = Worker.objects.update_or_create(
        name=presence.name,
        defaults={
            "kind": presence.kind,
            "host": presence.host,
            "started_at": presence.started_at,
            "heartbeat_at": database_now(),
            "state": _state(presence),
            **{name: value for name, value in reported.items() if value is not None},
        },
    )
    return WorkerMode(worker.mode)


def _forget_earlier_process(presence: Presence) -> None:
    """A worker that was started again has other queues and devices until it reports them."""
    earlier = Worker.objects.filter(name=presence.name, started_at__lt=presence.started_at)
    earlier.update(started_at=presence.started_at, capabilities=[], queues=[], devices=[])


def mark_worker_stopped(name: str) -> None:
    """Mark a worker offline that has stopped in order, before its next heartbeat is missed."""
    Worker.objects.filter(name=name).update(state=WorkerState.OFFLINE)


def _state(presence: Presence) -> WorkerState:
    if presence.stopping:
        return WorkerState.STOPPING
    busy = CompileJob.objects.filter(state=JobState.RUNNING, lease_owner=presence.name).exists()
    return WorkerState.BUSY if busy else WorkerState.IDLE


def mark_offline_workers() -> int:
    """Mark workers without a heartbeat for three periods offline; return how many."""
    _forget_replaced_tamiyos()
    forgotten = database_now() - FORGET_WORKERS_AFTER
    # A quarantine must not end because the worker was silent for an hour.
    Worker.objects.filter(heartbeat_at__lt=forgotten, mode=WorkerMode.ACTIVE).delete()
    limit = database_now() - timedelta(seconds=3 * settings.ESPER_WORKER_HEARTBEAT_SECONDS)
    return (
        Worker.objects.filter(heartbeat_at__lt=limit)
        .exclude(state=WorkerState.OFFLINE)
        .update(state=WorkerState.OFFLINE)
    )


def _forget_replaced_tamiyos() -> None:
    """Each start of Tamiyo has a name of its own; the one before is not missed any more."""
    tamiyos = Worker.objects.filter(kind=WorkerKind.TAMIYO)
    newest = tamiyos.exclude(state=WorkerState.OFFLINE).aggregate(at=Max("started_at"))["at"]
    if newest is not None:
        tamiyos.filter(state=WorkerState.OFFLINE, heartbeat_at__lt=newest).delete()
