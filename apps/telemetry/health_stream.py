"""The Redis stream that notifies Tamiyo. A lost entry loses no data: the frames are rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger(__name__)

STREAM = "esper:health"
MAX_ENTRIES = 10_000
MAX_BYTES = 256 * 1024 * 1024
FEWEST_ENTRIES = 200
QUIET_SECONDS = 2.0  # after a failure: an unreachable Redis must not slow down every batch

Entry = Mapping[Any, Any]  # field -> text, number or bytes, as redis-py takes them
_silent_until = 0.0


def add_frames(entries: Iterable[Entry]) -> None:
    """Append entries; an unreachable Redis is logged, and never fails the caller."""
    global _silent_until
    entries = list(entries)
    if not entries or time.monotonic() < _silent_until:
        return
    try:
        pipeline = _client().pipeline(transaction=False)
        for entry in entries:
            pipeline.xadd(STREAM, dict(entry), maxlen=_max_entries(entry), approximate=True)
        pipeline.execute()
    except (redis.RedisError, OSError) as error:
        _silent_until = time.monotonic() + QUIET_SECONDS
        log.warning("%d frames were not added to %s: %s", len(entries), STREAM, error)


def _max_entries(entry: Entry) -> int:
    """Frames of huge models must not fill Redis."""
    values = entry["values"]
    size = len(values) if isinstance(values, bytes) else 0
    return max(FEWEST_ENTRIES, min(MAX_ENTRIES, MAX_BYTES // max(size, 1)))


@cache
def _client() -> redis.Redis:
    return redis.Redis.from_url(
        settings.REDIS_URL,
        socket_connect_timeout=0.5,
        socket_timeout=1.0,
        retry=Retry(NoBackoff(), 0),
    )
