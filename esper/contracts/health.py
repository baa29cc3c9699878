"""What a trainer measures: layers, signals and frames.

Shape legend: L layers, S signals.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper.exceptions import CodecError

MAX_LAYERS = 5_000
MAX_NAME_LENGTH = 255


class Signal(StrEnum):
    """Columns of a health frame, in this order. Append only: stored frames rely on the order."""

    GRAD_NORM = "grad_norm"
    WEIGHT_NORM = "weight_norm"
    UPDATE_RATIO = "update_ratio"
    GRAFT_GRAD_SHARE = "graft_grad_share"
    ACT_MEAN = "act_mean"
    ACT_STD = "act_std"
    DEAD_FRACTION = "dead_fraction"
    SATURATION = "saturation"
    STABLE_RANK = "stable_rank"
    GRAD_SNR = "grad_snr"
    HEALTH = "health"


SIGNALS: tuple[Signal, ...] = tuple(Signal)
SIGNAL_INDEX: dict[Signal, int] = {signal: i for i, signal in enumerate(SIGNALS)}
# (unit, what it tells a person)
SIGNAL_NOTES: dict[Signal, tuple[str, str]] = {
    Signal.GRAD_NORM: ("L2", "norm of the layer's gradient"),
    Signal.WEIGHT_NORM: ("L2", "norm of the layer's weights"),
    Signal.UPDATE_RATIO: ("ratio", "update norm / weight norm; about 1e-3 is healthy"),
    Signal.GRAFT_GRAD_SHARE: ("0..1", "share of the layer's gradient that goes to its grafts"),
    Signal.ACT_MEAN: ("activation", "mean of the layer's output"),
    Signal.ACT_STD: ("activation", "standard deviation of the layer's output"),
    Signal.DEAD_FRACTION: ("0..1", "share of units with mean |h| <= 0.025 x the layer's mean"),
    Signal.SATURATION: ("0..1", "share of outputs within 1 % of the layer's extreme values"),
    Signal.STABLE_RANK: ("0..1", "stable rank of the weight / its largest possible rank"),
    Signal.GRAD_SNR: ("ratio", "|mean| / std of the gradient, from Adam's own buffers"),
    Signal.HEALTH: ("0..1", "0 poor, 1 good; weighted from the others, see esper.health.score"),
}


# Absent: unknown, empty.
_TUPLES = ("feeds", "kernel_size", "stride", "padding", "dilation", "cached_channels")


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A named module of the run's model, as it was seen to run.

    ``in_shape`` and ``out_shape`` include the batch axis and are empty where the layer never ran.
    """

    name: str
    kind: str  # class name of the module
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: str  # "float32"
    parameters: int
    graftable: bool
    reason: str = ""  # why not graftable, a sentence
    features_in: int = 0  # channels of the input, 0 unknown
    features_out: int = 0
    channel_axis: int = -1  # where the channels are: -1, or 1 for convolutions
    device: str = "cpu"
    order: int = 0  # first execution in a forward pass
    calls: int = 1  # calls per forward pass; > 1 for shared layers
    trainable: bool = True
    feeds: tuple[str, ...] = ()  # layers that were seen to run next
    # Geometry of a convolution with symmetric zero padding; empty for everything else.
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    # Of a layer that makes keys or values which a decoder caches: how wide one head is, and which
    # of its output channels (first, end) they are. 0 and empty for everything else.
    head_width: int = 0
    cached_channels: tuple[int, ...] = ()
    looks_ahead: bool = False  # True: all attention in its model says that it is not causal

    @property
    def has_sequence(self) -> bool:
        """True for [batch, time, channels] inputs."""
        return len(self.in_shape) == 3 and self.channel_axis == -1

    def to_wire(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "in_shape": list(self.in_shape),
            "out_shape": list(self.out_shape),
            "dtype": self.dtype,
            "parameters": self.parameters,
            "graftable": self.graftable,
            "reason": self.reason,
            "features_in": self.features_in,
            "features_out": self.features_out,
            "channel_axis": self.channel_axis,
            "device": self.device,
            "order": self.order,
            "calls": self.calls,
            "trainable": self.trainable,
            "feeds": list(self.feeds),
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "head_width": self.head_width,
            "cached_channels": list(self.cached_channels),
            "looks_ahead": self.looks_ahead,
        }

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> LayerInfo:
        try:
            tuples: dict[str, Any] = {name: tuple(data.get(name, ())) for name in _TUPLES}
            return cls(
                **{
                    **data,
                    **tuples,
                    "in_shape": tuple(data["in_shape"]),
                    "out_shape": tuple(data["out_shape"]),
                }
            )
        except (TypeError, KeyError) as error:
            raise CodecError(f"not a layer description: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class HealthFrame:
    """One sample of all layers' signals at one step.

    Attributes:
        step: optimizer step.
        wall_time: seconds since the epoch.
        layers: names, length L.
        values: float32 [L, S]; NaN means "not measured", never zero.
        metrics: run-wide numbers (loss, lr, step_ms, …); may be non-finite.
    """

    step: int
    wall_time: float
    layers: tuple[str, ...]
    values: NDArray[np.float32]
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = (len(self.layers), len(SIGNALS))
        if self.values.shape != expected or self.values.dtype != np.float32:
            raise CodecError(
                f"a frame of {expected[0]} layers is float32 {expected}, "
                f"got {self.values.dtype} {self.values.shape}"
            )

    def value(self, layer: str, signal: Signal) -> float:
        """One number; NaN where it was not measured."""
        return float(self.values[self.layers.index(layer), SIGNAL_INDEX[signal]])

    def column(self, signal: Signal) -> NDArray[np.float32]:
        """float32 [L]."""
        return self.values[:, SIGNAL_INDEX[signal]]


def pack_values(values: NDArray[np.float32]) -> str:
    """float32 [L, S] -> base64 of little-endian rows."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def unpack_values(text: str, layers: int) -> NDArray[np.float32]:
    """base64 -> float32 [L, S].

    Raises:
        CodecError: not base64, or not ``layers`` rows.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CodecError(f"frame values are not base64: {error}") from error
    return unpack_bytes(raw, layers)


def unpack_bytes(raw: bytes, layers: int) -> NDArray[np.float32]:
    """Little-endian float32 rows -> float32 [L, S]; raises ``CodecError`` on a wrong size."""
    if len(raw) != layers * len(SIGNALS) * 4:
        raise CodecError(
            f"a frame of {layers} layers x {len(SIGNALS)} signals has "
            f"{layers * len(SIGNALS) * 4} bytes, got {len(raw)}"
        )
    return np.frombuffer(raw, dtype="<f4").reshape(layers, len(SIGNALS)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a run that a person should know, also in observe mode."""

    rule: str
    layer: str
    severity: str
    observed: str
    limit: str
    remedy: str
