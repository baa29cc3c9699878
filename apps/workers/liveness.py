"""Which part of Esper has not reported for too long: the sweep, the workers, Tamiyo.

A page and a probe answer although every other process is dead, so they must say what is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.conf import settings
from django.db.models import Max
from django.utils import timezone

from apps.rest.clock import now as database_now
from apps.workers.models import PeriodicTask, Worker
from esper.contracts import WorkerKind
from hosts.disk import why_full
from hosts.runtime import read_runtime

SWEEP = "adaptations.sweep"  # every 2 s, by beat through the control worker
LATE_AFTER_SECONDS = 30.0
STARTING_SECONDS = 120.0  # web is up before the others; until then nothing is late
_started = time.monotonic()
_WHAT = {
    WorkerKind.CONTROL: "The control worker",
    WorkerKind.COMPILE: "The compile worker",
    WorkerKind.TAMIYO: "Tamiyo",
}


@dataclass(frozen=True, slots=True)
class Part:
    """One part that must report.

    Attributes:
        name: ``sweep``, ``control``, ``compile`` or ``tamiyo``.
        what: the beginning of a sentence about it.
        age_seconds: since its last report; None: it has never reported.
        late: it should have reported by now.
    """

    name: str
    what: str
    age_seconds: float | None
    late: bool

    @property
    def text(self) -> str:
        """A sentence for people."""
        if self.age_seconds is None:
            return f"{self.what} has not reported yet."
        return f"{self.what} has not reported for {self.age_seconds:.0f} s."


@dataclass(frozen=True, slots=True)
class Down:
    """A process that the supervisor of this machine cannot keep running."""

    name: str
    since: datetime
    ends: int
    why: str
    tail: tuple[str, ...]


def note_periodic_run(name: str) -> None:
    """Record that a periodic task has done one round."""
    now = database_now()
    if not PeriodicTask.objects.filter(name=name).update(ran_at=now):
        PeriodicTask.objects.get_or_create(name=name, defaults={"ran_at": now})


def parts() -> list[Part]:
    """The sweep, and the newest report of each kind of worker."""
    seen: dict[str, datetime | None] = dict(
        Worker.objects.order_by().values_list("kind").annotate(Max("heartbeat_at"))
    )
    swept = PeriodicTask.objects.filter(name=SWEEP).values_list("ran_at", flat=True).first()
    workers = [_part(str(kind), what, seen.get(kind)) for kind, what in _WHAT.items()]
    return [_part("sweep", "The periodic check of deadlines", swept), *workers]


def _part(name: str, what: str, seen_at: datetime | None) -> Part:
    age = (database_now() - seen_at).total_seconds() if seen_at else None
    starting = time.monotonic() - _started < STARTING_SECONDS
    limit = max(LATE_AFTER_SECONDS, 3.0 * settings.ESPER_WORKER_HEARTBEAT_SECONDS)
    return Part(name, what, age, late=not starting and (age is None or age > limit))


def down_processes() -> list[Down]:
    """What the supervisor on this machine has noted; empty where there is none."""
    noted: dict[str, dict[str, Any]] = read_runtime(settings.ESPER_DATA_DIR).get("down", {})
    return [
        Down(
            name=name,
            since=datetime.fromtimestamp(entry["since"], timezone.get_default_timezone()),
            ends=entry["ends"],
            why=entry["why"],
            tail=tuple(entry["tail"]),
        )
        for name, entry in noted.items()
    ]


def disk_problem() -> str:
    """A sentence when the disk of the data directory is full, else empty."""
    return why_full(settings.ESPER_DATA_DIR)
