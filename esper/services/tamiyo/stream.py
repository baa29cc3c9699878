"""The Redis stream with a notification for each stored batch of health frames.

Losing or repeating an entry loses or repeats no decision, because a run's state is read from the
server, and a proposal carries its idempotency key.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

logger = logging.getLogger("esper.tamiyo")

STREAM = "esper:health"
GROUP = "tamiyo"
_FORGET_CONSUMER_MS = 3_600_000
ENTRIES_AT_ONCE = 32  # each of up to 2 MB


@dataclass(frozen=True, slots=True)
class HealthEntry:
    """One frame of one run.

    Attributes:
        id: of the entry in the stream; an entry has the newest frames of a batch.
        stored_at: seconds since the epoch, by Redis's clock.
        values: little-endian float32 [layers, signals].
        loss: the newest training loss, NaN once it diverged; None: not known.
        findings: how many findings the trainer reported together with this frame.
    """

    id: bytes
    run: str
    epoch: int
    step: int
    wall_time: float
    values: bytes
    loss: float | None
    stored_at: float
    findings: int = 0


class HealthStream:
    """One consumer of the group; raises ``RedisError`` while Redis is away.

    Args:
        consumer: name of this instance.
        claim_seconds: an entry that another consumer holds for longer is taken over.
    """

    def __init__(self, url: str, *, consumer: str, claim_seconds: float) -> None:
        # Our own loop backs off and says so; redis-py's silent retries would hide an outage.
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_connect_timeout=2.0, socket_timeout=5.0, retry=Retry(NoBackoff(), 0)
        )
        self._consumer = consumer
        self._claim_seconds = claim_seconds
        self._claimed_at = -math.inf
        self.malformed = 0

    async def read(
        self, *, wait_seconds: float = 1.0, count: int = ENTRIES_AT_ONCE
    ) -> list[HealthEntry]:
        """Entries that no other instance holds: abandoned ones first, then new ones."""
        try:
            raw = await self._abandoned(count) or await self._new(wait_seconds, count)
        except ResponseError as error:
            # NOGROUP: first start, or Redis was flushed. UNBLOCKED: flushed while we waited.
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
            await self._create_group()
            return []
        return await self._parse_all(raw)

    async def ack(self, entries: list[HealthEntry]) -> None:
        if entries:
            await self._redis.xack(STREAM, GROUP, *{entry.id for entry in entries})

    async def close(self) -> None:
        """Leave the group, unless this instance still holds entries."""
        with contextlib.suppress(RedisError, OSError):
            await self._forget_consumers()
        await self._redis.aclose()

    async def _new(self, wait_seconds: float, count: int) -> list[Any]:
        answer = await self._redis.xreadgroup(
            GROUP, self._consumer, {STREAM: ">"}, count=count, block=int(wait_seconds * 1000)
        )
        return answer[0][1] if answer else []

    async def _abandoned(self, count: int) -> list[Any]:
        if time.monotonic() - self._claimed_at < self._claim_seconds:
            return []
        answer = await self._redis.xautoclaim(
            STREAM, GROUP, self._consumer, int(self._claim_seconds * 1000), count=count
        )
        if len(answer[1]) < count:  # nothing is left: look again after a while
            self._claimed_at = time.monotonic()
        return list(answer[1])

    async def _create_group(self) -> None:
        try:
            # From the start: what was added between a flush and now must not be missed.
            await self._redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):  # another instance was first
                raise

    async def _forget_consumers(self) -> None:
        """Remove this instance and long ended ones; one with entries stays, to be claimed."""
        for consumer in await self._redis.xinfo_consumers(STREAM, GROUP):
            name = consumer["name"]
            mine = name == self._consumer.encode()
            if consumer["pending"] == 0 and (mine or consumer["idle"] > _FORGET_CONSUMER_MS):
                await self._redis.xgroup_delconsumer(STREAM, GROUP, name)

    async def _parse_all(self, raw: list[Any]) -> list[HealthEntry]:
        entries: list[HealthEntry] = []
        broken: list[bytes] = []
        for entry_id, fields in raw:
            frames = _parse(entry_id, fields)
            if frames is None:
                broken.append(entry_id)
            else:
                entries += frames
        if broken:  # malformed for good: acknowledge them, so that they do not come back
            self.malformed += len(broken)
            logger.warning("%d entries of %s make no sense", len(broken), STREAM)
            await self._redis.xack(STREAM, GROUP, *broken)
        return entries


def _parse(entry_id: bytes, fields: dict[bytes, bytes]) -> list[HealthEntry] | None:
    """The frames of an entry; None where it makes no sense."""
    try:
        count = int(fields[b"frames"])
        steps = fields[b"steps"].split(b",")
        wall_times = fields[b"wall_times"].split(b",")
        losses = fields[b"losses"].split(b",")
        size, rest = divmod(len(fields[b"values"]), count)
        if rest or not len(steps) == len(wall_times) == len(losses) == count:
            return None
        stored_at = int(entry_id.split(b"-")[0]) / 1000
        return [
            HealthEntry(
                id=entry_id,
                run=fields[b"run"].decode(),
                epoch=int(fields[b"epoch"]),
                step=int(steps[index]),
                wall_time=float(wall_times[index]),
                values=fields[b"values"][index * size : (index + 1) * size],
                loss=float(losses[index]) if losses[index] else None,
                stored_at=stored_at,
                findings=int(fields.get(b"findings", 0)),
            )
            for index in range(count)
        ]
    except (KeyError, ValueError, TypeError, ZeroDivisionError):
        return None
