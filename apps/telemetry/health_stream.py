"""The Redis stream that notifies Tamiyo: one entry for each batch with frames.

A lost entry loses no data: the frames are rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
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


def add_batch(entry: Entry) -> None:
    """Append a batch; an unreachable Redis is logged, and never fails the caller."""
    global _silent_until
    if time.monotonic() < _silent_until:
        return
    try:
        _client().xadd(STREAM, dict(entry), maxlen=_max_entries(entry), approximate=True)
    except (redis.RedisError, OSError) as error:
        _silent_until = time.monotonic() + QUIET_SECONDS
        log.warning("%s frames were not added to %s: %s", entry["frames"], STREAM, error)


def _max_entries(entry: Entry) -> int:
    """Batches of huge models must not fill Redis."""
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
