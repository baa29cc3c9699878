"""Telemetry that waits to be sent: bounded, counted, and cut into batches that never change.

The training thread offers, the transport thread takes. When the server is away for long, the
oldest items are dropped and counted: what was offered = what was stored + what was dropped.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from esper.contracts import Finding, HealthFrame, codec, protocol, telemetry_body, wire

MAX_WAITING_METRICS = 20_000
MAX_WAITING_FRAMES = 200
MAX_WAITING_FINDINGS = 500
MAX_BATCH_METRICS = 500
MAX_BATCH_VALUES = 10_000  # of these metrics together; a server takes twice as many
MAX_BATCH_FINDINGS = 100
MAX_BATCH_FRAME_BYTES = 300_000  # of packed values; a body may have 1 MiB
JSON = "application/json"

_Metrics = tuple[int, float, Mapping[str, float]]  # step, wall time, name -> value


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it is posted, again and again, until it is answered.

    Attributes:
        message: with ``seq_from`` and ``seq_to``.
        items: frames + metrics + findings in it.
        dropped: items lost before it, as it reports to the server.
    """

    message: protocol.Telemetry
    items: int
    dropped: int

    def content(self, *, raw: bool) -> tuple[bytes, str]:
        """The body and its media type; ``raw``: the values of frames as bytes, not as base64.

        Raises:
            CodecError: the batch cannot be sent as strict JSON.
        """
        if not raw:
            return codec.encode(wire.to_wire(self.message)), JSON
        values = [frame.values for frame in self.message.frames]
        frames = tuple(structs.replace(frame, values=b"") for frame in self.message.frames)
        members: dict[str, Any] = wire.to_wire(structs.replace(self.message, frames=frames))
        for frame in members["frames"]:
            del frame["values"]
        return telemetry_body.encode_body(members, values), telemetry_body.MEDIA_TYPE


class TelemetryQueue:
    """Items between the training thread and the transport thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: deque[HealthFrame] = deque()
        self._metrics: deque[_Metrics] = deque()
        self._findings: deque[Finding] = deque()
        self._seq = 0
        self._unreported = 0
        self.offered = 0
        self.stored = 0
        self.dropped = 0

    def offer_frame(self, frame: HealthFrame) -> None:
        self._offer(self._frames, frame, MAX_WAITING_FRAMES)

    def offer_metrics(self, step: int, wall_time: float, values: Mapping[str, float]) -> None:
        self._offer(self._metrics, (step, wall_time, values), MAX_WAITING_METRICS)

    def offer_finding(self, finding: Finding) -> None:
        self._offer(self._findings, finding, MAX_WAITING_FINDINGS)

    def __len__(self) -> int:
        return len(self._frames) + len(self._metrics) + len(self._findings)

    def counts(self) -> dict[str, int]:
        """Items offered, stored by the server, dropped, waiting."""
        return {
            "offered": self.offered,
            "stored": self.stored,
            "dropped": self.dropped,
            "waiting": len(self),
        }

    @property
    def unreported(self) -> int:
        """Drops that no batch has reported yet."""
        return self._unreported

    @property
    def crowded(self) -> bool:
        """More waits than one batch takes."""
        return len(self._metrics) >= MAX_BATCH_METRICS or len(self._frames) > MAX_WAITING_FRAMES / 2

    def take(self, epoch: int) -> Batch | None:
        """The next batch, None when nothing waits. It must be settled before the next is taken."""
        with self._lock:
            frames = self._take_frames()
            metrics = self._take_metrics()
            findings = _take(self._findings, MAX_BATCH_FINDINGS)
            items = len(frames) + len(metrics) + len(findings)
            if not items:
                return None
            first, self._seq = self._seq + 1, self._seq + items
            dropped, self._unreported = self._unreported, 0
        message = protocol.Telemetry(
            epoch=epoch,
            seq_from=first,
            seq_to=self._seq,
            frames=tuple(protocol.Frame.of(frame) for frame in frames),
            metrics=tuple(
                protocol.Metrics(step=step, wall_time=wall_time, values=dict(values))
                for step, wall_time, values in metrics
            ),
            findings=tuple(findings),
            dropped=dropped,
        )
        return Batch(message=message, items=items, dropped=dropped)

    def settle_stored(self, batch: Batch) -> None:
        self.stored += batch.items

    def settle_dropped(self, batch: Batch) -> None:
        """The server will never take this batch."""
        with self._lock:
            self.dropped += batch.items
            self._unreported += batch.items + batch.dropped

    def _offer(self, waiting: deque[Any], item: object, bound: int) -> None:
        with self._lock:
            waiting.append(item)
            self.offered += 1
            if len(waiting) > bound:
                waiting.popleft()
                self.dropped += 1
                self._unreported += 1

    def _take_frames(self) -> list[HealthFrame]:
        frames: list[HealthFrame] = []
        size = 0
        while self._frames and (not frames or size < MAX_BATCH_FRAME_BYTES):
            frame = self._frames.popleft()
            size += frame.values.nbytes
            frames.append(frame)
        return frames

    def _take_metrics(self) -> list[_Metrics]:
        metrics: list[_Metrics] = []
        values = 0
        while self._metrics and len(metrics) < MAX_BATCH_METRICS and values < MAX_BATCH_VALUES:
            entry = self._metrics.popleft()
            values += len(entry[2])
            metrics.append(entry)
        return metrics


def _take(waiting: deque[Any], most: int) -> list[Any]:
    return [waiting.popleft() for _ in range(min(most, len(waiting)))]
