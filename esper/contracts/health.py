"""What a trainer measures: layers, signals and frames.

Shape legend: L layers, S signals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from esper.contracts import wire
from esper.contracts.enums import Severity, ViolationRule
from esper.contracts.wire import Int64, Shape, ShortText
from esper.exceptions import CodecError

MAX_LAYERS = 5_000


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
    ACT_ABS_MAX = "act_abs_max"
    INACTIVE_FRACTION = "inactive_fraction"
    GRAD_ZERO_SHARE = "grad_zero_share"


SIGNALS: tuple[Signal, ...] = tuple(Signal)
# How many columns frames of older versions have; the missing ones are unknown.
EARLIER_COLUMNS = (11,)
SIGNAL_INDEX: dict[Signal, int] = {signal: i for i, signal in enumerate(SIGNALS)}
# (unit, what it tells a person)
SIGNAL_NOTES: dict[Signal, tuple[str, str]] = {
    Signal.GRAD_NORM: ("L2", "norm of the layer's gradient"),
    Signal.WEIGHT_NORM: ("L2", "norm of the layer's weights"),
    Signal.UPDATE_RATIO: ("ratio", "update norm / weight norm; about 1e-3 is healthy"),
    Signal.GRAFT_GRAD_SHARE: ("0..1", "share of the layer's gradient that goes to its grafts"),
    Signal.ACT_MEAN: ("activation", "mean of what the layer gives to the next one"),
    Signal.ACT_STD: ("activation", "standard deviation of what the layer gives to the next one"),
    Signal.DEAD_FRACTION: ("0..1", "share of units with mean |h| <= 0.025 x the layer's mean"),
    Signal.SATURATION: ("0..1", "share of activations within 1% of the layer's extreme values"),
    Signal.STABLE_RANK: ("0..1", "stable rank of the weight / its largest possible rank"),
    Signal.GRAD_SNR: ("ratio", "|mean| / std of the gradient, from Adam's own buffers"),
    Signal.HEALTH: (
        "0..1",
        "1 as usual, 0 far from it; by limits, own past, peers and findings",
    ),
    Signal.ACT_ABS_MAX: ("activation", "largest |h| that the layer gives to the next one"),
    Signal.INACTIVE_FRACTION: ("0..1", "share of units that are exactly 0 in 99% of the samples"),
    Signal.GRAD_ZERO_SHARE: ("0..1", "share of the gradient's entries that are exactly 0"),
}


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A named module of the run's model, as traced in a forward pass.

    ``in_shape`` and ``out_shape`` include the batch axis and are empty where the layer never ran.
    """

    name: ShortText  # empty: the model itself
    kind: ShortText  # class name of the module
    in_shape: Shape
    out_shape: Shape
    dtype: ShortText  # "float32"
    parameters: Int64
    graftable: bool
    reason: Annotated[str, Meta(max_length=1000)] = ""  # why not graftable, a sentence
    features_in: Int64 = 0  # channels of the input, 0 unknown
    features_out: Int64 = 0
    channel_axis: Int64 = -1  # where the channels are: -1, or 1 for convolutions
    device: ShortText = "cpu"
    order: Int64 = 0  # first execution in a forward pass
    calls: Int64 = 1  # calls per forward pass; > 1 for shared layers
    trainable: bool = True
    feeds: Annotated[
        tuple[ShortText, ...], Meta(max_length=256)
    ] = ()  # layers that ran next in the trace
    # Geometry of a convolution with symmetric zero padding; empty for everything else.
    kernel_size: Shape = ()
    stride: Shape = ()
    padding: Shape = ()
    dilation: Shape = ()
    groups: Int64 = 1
    # For a layer whose output holds keys or values that a decoder caches: the width of one head,
    # and the output channels (first, end) that hold them. 0 and empty for other layers.
    head_width: Int64 = 0
    cached_channels: Shape = ()
    looks_ahead: bool = False  # True: all attention in the model is declared non-causal
    # Axis of time in a [., ., channels] input: 1 or 0; -1 where the model has modules that take
    # time first, and the shape of this layer does not tell whether it belongs to them.
    sequence_axis: Annotated[int, Meta(ge=-1, le=1)] = 1
    # The function that was seen between the output of the layer that ran before and this input.
    activation: ShortText = ""
    compiled: bool = False  # it runs in code of torch.compile, so a graft means a recompilation
    recomputed: Int64 = 0  # region of activation checkpointing, counted from 1; 0: none
    # Not empty: the place of a graft that spans layers. It reads the input of the layer ``since``,
    # which ``in_shape`` and ``features_in`` describe, and adds to the output of this one.
    since: ShortText = ""

    @property
    def has_sequence(self) -> bool:
        """True for [batch, time, channels] inputs, or [time, batch, channels]."""
        return len(self.in_shape) == 3 and self.channel_axis == -1

    def __str__(self) -> str:
        shapes = f"{list(self.in_shape)} -> {list(self.out_shape)}" if self.out_shape else "not run"
        span = f" parallel to {self.since} … {self.name}" if self.since else ""
        graftable = "graftable" if self.graftable else f"not graftable: {self.reason or 'unknown'}"
        return (
            f"{self.name or 'the model'}: {self.kind}{span} {shapes}, {self.dtype}, "
            f"{self.parameters:,} parameters, {graftable}"
        )

    def __repr__(self) -> str:
        return f"<LayerInfo {self}>"

    def to_wire(self) -> dict[str, Any]:
        members: dict[str, Any] = wire.to_wire(self)
        return members

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> LayerInfo:
        """Raises ``MessageError``; unknown members are ignored."""
        return wire.from_wire(cls, data)


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


def columns_of(size: int, layers: int) -> int:
    """How many signals a frame of ``size`` bytes holds; 0 where it is no frame of these layers."""
    known = (len(SIGNALS), *EARLIER_COLUMNS)
    return next((count for count in known if size == layers * count * 4), 0)


def unpack_bytes(raw: bytes, layers: int) -> NDArray[np.float32]:
    """Little-endian float32 rows -> float32 [L, S]; raises ``CodecError`` on a wrong size.

    Frames of older versions lack the last signals, which are NaN then.
    """
    columns = columns_of(len(raw), layers)
    if not columns:
        raise CodecError(
            f"a frame of {layers} layers x {len(SIGNALS)} signals has "
            f"{layers * len(SIGNALS) * 4} bytes, got {len(raw)}"
        )
    values = np.full((layers, len(SIGNALS)), np.nan, dtype=np.float32)
    values[:, :columns] = np.frombuffer(raw, dtype="<f4").reshape(layers, columns)
    return values


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a run that a person should know, also in observe mode.

    Attributes:
        rule: the violated rule.
        layer: the layer where it began; empty for the run as a whole.
        severity: how bad it is.
        observed: what was measured; the server keeps 500 characters of it and of the next two.
        limit: what was expected.
        remedy: what a person can do.
        slug: the rule of the diagnosis, such as ``dying_relu``; empty for every other finding.
        since_step: the first step of which it is known; -1 unknown.
        resolved_step: the step at which it was over; -1: it is open.
        remedies: what can answer it, in the order in which to try them.
    """

    rule: ViolationRule
    layer: ShortText
    severity: Severity
    observed: str
    limit: str
    remedy: str
    slug: ShortText = ""
    since_step: Int64 = -1
    resolved_step: Int64 = -1
    remedies: Annotated[tuple[ShortText, ...], Meta(max_length=32)] = ()

    def __str__(self) -> str:
        place = f" at {self.layer!r}" if self.layer else ""
        return (
            f"{self.severity} finding{place}: {self.observed.rstrip('. ')}. "
            f"{self.remedy[:1].upper()}{self.remedy[1:].rstrip('.')}. [{self.slug or self.rule}]"
        )

    def __repr__(self) -> str:
        return f"<Finding {self}>"
