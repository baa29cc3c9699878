"""The database's clock, by which deadlines and the expiry of commands are set and judged.

Each process has a clock of its own, and one that is wrong by an hour would let a command expire
before it is sent, or be valid for an hour too long.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db import connection
from django.utils import timezone

READ_AGAIN_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Reading:
    """The database's time at a moment of this process's monotonic clock, which nobody sets."""

    time: datetime
    moment: float


_last: _Reading | None = None


def now() -> datetime:
    """The database's time; read from it at most every 30 s. SQLite's is that of this machine."""
    if connection.vendor == "sqlite":
        return timezone.now()
    global _last
    reading = _last
    if reading is None or time.monotonic() - reading.moment > READ_AGAIN_SECONDS:
        reading = _last = _read()
    return reading.time + timedelta(seconds=time.monotonic() - reading.moment)


def _read() -> _Reading:
    before = time.monotonic()
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        answer: datetime = cursor.fetchone()[0]
    return _Reading(answer, (before + time.monotonic()) / 2)
