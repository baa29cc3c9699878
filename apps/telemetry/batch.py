"""A batch of telemetry, once it has been checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FrameItem:
    step: int
    wall_time: float
    values: bytes  # little-endian float32 [layers, signals]


@dataclass(frozen=True, slots=True)
class MetricItem:
    step: int
    wall_time: float
    name: str
    value: float  # may be non-finite


@dataclass(frozen=True, slots=True)
class Batch:
    """``seq_from..seq_to`` are the items' numbers in the trainer's own sequence."""

    epoch: int
    seq_from: int
    seq_to: int
    frames: list[FrameItem]
    metrics: list[MetricItem]
    findings: list[dict[str, Any]]
    dropped: int
    items: int
