"""Rolling features of a run: the trend of its loss, and how its layers compare.

Shape legend: T loss samples, F frames, L layers, S signals, B blocks of the loss.

Everything is vectorised over layers: 2,000 of them must cost milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from esper.contracts import (
    SIGNAL_INDEX,
    SIGNALS,
    AdaptationType,
    HealthFrame,
    LayerInfo,
    RunSnapshot,
    Signal,
)
from esper.health.score import health_scores, layer_medians

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

MIN_LOSS_SAMPLES = 32
MAX_FRAMES = 32  # older ones do not describe the present
BLOCKS = 24
# A loss that follows step^-alpha with alpha below this counts as flat: training twice as long
# would lower it by less than 10 %.
FLAT_EXPONENT = 0.15
SPIKE = 6.0  # deviations
HUGE_UPDATE = 0.1  # update / weight; 1e-3 is usual
MAX_EXTRAPOLATION = 4.0  # a window of n steps predicts at most 4 n steps
SURE_ERROR = 0.2  # with a larger error, no loss counts as flat


@dataclass(frozen=True, slots=True)
class LossFeatures:
    """Features of the loss.

    Attributes:
        samples: number of finite samples.
        level: median of the newest eighth; initial: median of the oldest fiftieth.
        noise: robust standard deviation of single samples around the recent trend.
        exponent: alpha of the local law loss ~ step^-alpha; above 0, the loss falls.
        exponent_error: standard error of ``exponent``.
        plateau_score: probability that ``exponent`` is below ``FLAT_EXPONENT``, 0..1; NaN while
            the noise hides the trend (error above ``SURE_ERROR``).
        spike_score: median deviation of the three newest samples from the recent trend, in
            units of ``noise``; one outlier is not a spike.
        non_finite: samples of the newest eighth that are not finite.
        from_start: the samples reach back to the first tenth of the run.
        held_out: newest held-out loss.
    """

    samples: int = 0
    level: float = math.nan
    initial: float = math.nan
    noise: float = math.nan
    exponent: float = math.nan
    exponent_error: float = math.nan
    plateau_score: float = math.nan
    spike_score: float = math.nan
    non_finite: int = 0
    from_start: bool = False
    held_out: float = math.nan

    @property
    def headroom(self) -> float:
        """Level relative to the first losses; near 0, little can be gained."""
        return self.level / self.initial if self.initial > 0 else math.nan


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The inputs of the policy.

    Attributes:
        layers: as registered, length L; index: name -> row.
        latest: float32 [L, S], newest known value within the window of frames; NaN unknown.
        trend: float32 [L, S], relative change from the older to the newer half of the frames.
        z: float32 [L, S], robust z-score across layers of the latest values (norms and ratios on
            a log scale); NaN unknown.
        medians: float32 [S] across layers.
        unstable: float32 [L], 0..1, how much a layer contributes to a divergence.
        remedies: adaptation types of the layer's present grafts.
    """

    loss: LossFeatures
    layers: tuple[LayerInfo, ...]
    index: Mapping[str, int]
    latest: Floats
    trend: Floats
    z: Floats
    medians: Floats
    unstable: Floats
    frames: int = 0
    remedies: Mapping[str, frozenset[AdaptationType]] = field(default_factory=dict)

    def value(self, layer: str, signal: Signal) -> float:
        """Newest known value, NaN unknown."""
        row = self.index.get(layer)
        return math.nan if row is None else float(self.latest[row, SIGNAL_INDEX[signal]])

    def column(self, signal: Signal) -> Floats:
        """float32 [L]."""
        return self.latest[:, SIGNAL_INDEX[signal]]

    def trend_of(self, layer: str, signal: Signal) -> float:
        """Relative change over the window, NaN unknown."""
        row = self.index.get(layer)
        return math.nan if row is None else float(self.trend[row, SIGNAL_INDEX[signal]])

    def instability(self, layer: str) -> float:
        """0..1; 0 for an unknown layer."""
        row = self.index.get(layer)
        return 0.0 if row is None else float(self.unstable[row])


@np.errstate(all="ignore")  # NaN and inf are valid data here
def extract_features(
    snapshot: RunSnapshot, types: Mapping[str, AdaptationType] | None = None
) -> Features:
    """Features of a run.

    Args:
        snapshot: the run; frames oldest first.
        types: adaptation type of each blueprint slug, to read a layer's grafts.
    """
    names = tuple(layer.name for layer in snapshot.layers)
    frames = snapshot.frames[-MAX_FRAMES:]
    values = [_aligned(frame, names) for frame in frames]
    latest = _newest_known(values, len(names))
    health_L = latest[:, SIGNAL_INDEX[Signal.HEALTH]]  # of the trainer, which knows more
    np.copyto(health_L, health_scores(latest), where=np.isnan(health_L))
    medians = layer_medians(latest)
    loss = replace(
        loss_features(snapshot.loss_steps, snapshot.loss, since=snapshot.last_adaptation_step),
        held_out=snapshot.held_out,
    )
    return Features(
        loss=loss,
        layers=snapshot.layers,
        index={name: row for row, name in enumerate(names)},
        latest=latest,
        trend=_trend(values, len(names)),
        z=_z_across_layers(latest),
        medians=medians,
        unstable=_unstable(latest, loss),
        frames=len(frames),
        remedies=_remedies(snapshot, types or {}),
    )


@np.errstate(all="ignore")  # NaN and inf are valid data here
def loss_features(steps_T: NDArray[np.int64], loss_T: Doubles, *, since: int = -1) -> LossFeatures:
    """Features of the loss; mostly NaN below ``MIN_LOSS_SAMPLES`` samples after ``since``.

    ``since`` is the step of the last adaptation: a curve that was changed has no single
    trend. The recent half of the run is cut into blocks; Theil–Sen gives their slope and the
    median absolute deviation of the residuals its error (Sen 1968), so single spikes do not count.
    """
    finite_T = np.isfinite(loss_T)
    eighth = max(1, len(loss_T) // 8)
    non_finite = int((~finite_T[-eighth:]).sum())
    initial = (
        float(np.median(loss_T[finite_T][: max(5, len(loss_T) // 50)]))
        if finite_T.any()
        else math.nan
    )
    begin = int(steps_T[0]) if len(steps_T) else 0
    kept_T = finite_T & (steps_T > since)
    steps_T, loss_T = steps_T[kept_T], loss_T[kept_T]
    if len(loss_T) < MIN_LOSS_SAMPLES:
        level = float(np.median(loss_T[-eighth:])) if len(loss_T) else math.nan
        return LossFeatures(
            samples=len(loss_T), level=level, initial=initial, non_finite=non_finite
        )
    recent_T = _recent_half(steps_T)
    steps_T, recent_loss_T = steps_T[recent_T], loss_T[recent_T]
    slope, middle_step, middle, slope_error = _robust_line(steps_T, recent_loss_T)
    residuals = recent_loss_T - (middle + slope * (steps_T - middle_step))
    noise = _deviation(residuals)
    exponent, error = _exponent(steps_T, middle_step, middle, slope, slope_error)
    return LossFeatures(
        samples=len(loss_T),
        level=float(np.median(loss_T[-max(1, len(loss_T) // 8) :])),
        initial=initial,
        noise=noise,
        exponent=exponent,
        exponent_error=error,
        plateau_score=_below(FLAT_EXPONENT, exponent, error),
        spike_score=_spike(residuals, noise, middle),
        non_finite=non_finite,
        from_start=begin <= steps_T[-1] / 10,
    )


def _recent_half(steps_T: NDArray[np.int64]) -> slice:
    """Samples of the second half of the run's steps; of a window that begins later, all."""
    begin = int(np.searchsorted(steps_T, steps_T[-1] // 2))
    return slice(min(begin, len(steps_T) - MIN_LOSS_SAMPLES // 2), None)


def _aligned(frame: HealthFrame, names: tuple[str, ...]) -> Floats:
    """The frame's rows in the order of ``names``; NaN rows for layers that it lacks."""
    if frame.layers == names:
        return frame.values
    rows = {name: row for row, name in enumerate(frame.layers)}
    aligned = np.full((len(names), len(SIGNALS)), np.nan, dtype=np.float32)
    for target, name in enumerate(names):
        if name in rows:
            aligned[target] = frame.values[rows[name]]
    return aligned


def _newest_known(values: list[Floats], layers: int) -> Floats:
    latest = np.full((layers, len(SIGNALS)), np.nan, dtype=np.float32)
    for frame in reversed(values):
        unknown = np.isnan(latest)
        if not unknown.any():
            break
        np.copyto(latest, frame, where=unknown)
    return latest


def _trend(values: list[Floats], layers: int) -> Floats:
    """(mean of newer half - mean of older half) / |mean of older half|, finite values only."""
    half = len(values) // 2
    if half == 0:
        return np.full((layers, len(SIGNALS)), np.nan, dtype=np.float32)
    older, newer = _known_mean(values[:half]), _known_mean(values[half:])
    change = (newer - older) / np.abs(older)
    return np.where(np.isfinite(change), change, np.nan).astype(np.float32)


def _known_mean(values: list[Floats]) -> Floats:
    total = np.zeros_like(values[0])
    count = np.zeros_like(values[0])
    for frame in values:
        known = np.isfinite(frame)
        np.add(total, frame, out=total, where=known)
        count += known
    mean = np.divide(total, count)
    return mean.astype(np.float32)


# Norms and ratios span decades and are compared as logarithms; shares are not.
_LOG_SIGNALS = [
    SIGNAL_INDEX[signal]
    for signal in (
        Signal.GRAD_NORM,
        Signal.WEIGHT_NORM,
        Signal.UPDATE_RATIO,
        Signal.ACT_STD,
        Signal.GRAD_SNR,
    )
]


def _z_across_layers(latest: Floats) -> Floats:
    scaled = latest.astype(np.float32, copy=True)
    scaled[:, _LOG_SIGNALS] = np.log10(scaled[:, _LOG_SIGNALS])
    scaled[~np.isfinite(scaled)] = np.nan
    distance = scaled - layer_medians(scaled)
    spread = 1.4826 * layer_medians(np.abs(distance))
    z = distance / spread
    z[~np.isfinite(z)] = np.nan
    return z


def _remedies(
    snapshot: RunSnapshot, types: Mapping[str, AdaptationType]
) -> dict[str, frozenset[AdaptationType]]:
    return {
        name: frozenset(types[slug] for slug in history.grafts if slug in types)
        for name, history in snapshot.history.items()
        if history.grafts
    }


def _robust_line(steps_T: NDArray[np.int64], loss_T: Doubles) -> tuple[float, float, float, float]:
    """(slope per step, middle step, loss there, standard error of the slope)."""
    blocks = min(BLOCKS, len(loss_T) // 4)
    edges = np.linspace(0, len(loss_T), blocks + 1).astype(int)[:-1]
    sizes_B = np.diff(np.append(edges, len(loss_T)))
    x_B = np.add.reduceat(steps_T.astype(np.float64), edges) / sizes_B
    y_B = np.add.reduceat(loss_T, edges) / sizes_B
    i, j = np.triu_indices(blocks, 1)
    run = x_B[j] - x_B[i]
    rising = run > 0
    if not rising.any():
        return 0.0, float(x_B.mean()), float(np.median(y_B)), math.inf
    slope = float(np.median((y_B[j] - y_B[i])[rising] / run[rising]))
    middle_step = float(np.median(x_B))
    middle = float(np.median(y_B - slope * (x_B - middle_step)))
    scatter = _deviation(y_B - (middle + slope * (x_B - middle_step)))
    error = scatter / math.sqrt(float(((x_B - x_B.mean()) ** 2).sum()))
    return slope, middle_step, middle, error


def _exponent(
    steps_T: NDArray[np.int64], middle_step: float, middle: float, slope: float, error: float
) -> tuple[float, float]:
    """alpha = -slope * step / level in the middle of the window, and its standard error."""
    span = float(steps_T[-1] - steps_T[0]) + 1.0
    horizon = min(middle_step + 1.0, MAX_EXTRAPOLATION * span)
    level = max(abs(middle), 1e-12)
    return -slope * horizon / level, error * horizon / level


def _below(limit: float, value: float, error: float) -> float:
    """P(true value < limit) for a normal estimate."""
    if not error <= SURE_ERROR:
        return math.nan
    return 0.5 * math.erfc((value - limit) / (math.sqrt(2.0) * max(error, 1e-9)))


def _deviation(residuals: Doubles) -> float:
    """Standard deviation from the median absolute deviation, right for normal noise."""
    return float(1.4826 * np.median(np.abs(residuals - np.median(residuals))))


def _spike(residuals: Doubles, noise: float, level: float) -> float:
    # A tenth of SPIKE of the level is the least noise that counts: a rise of less than 10 % of
    # the level is no spike, however smooth the curve was before.
    floor = max(noise, 0.1 / SPIKE * abs(level), 1e-12)
    return float(max(0.0, np.median(residuals[-3:])) / floor)


def _unstable(latest: Floats, loss: LossFeatures) -> Floats:
    """float32 [L]: a jump of the loss is attributed to the layer that changes most."""
    ratio_L = latest[:, SIGNAL_INDEX[Signal.UPDATE_RATIO]]
    unstable_L = np.zeros(len(latest), dtype=np.float32)
    # Large steps early in a healthy run are normal.
    if loss.exponent < FLAT_EXPONENT:
        decades_L = np.log10(ratio_L / HUGE_UPDATE)
        huge_L = ratio_L >= HUGE_UPDATE
        unstable_L[huge_L] = np.clip(0.5 + 0.5 * decades_L[huge_L], 0.0, 1.0)
    suspect = _suspect(latest)
    jump = 1.0 if loss.non_finite else (loss.spike_score - SPIKE) / SPIKE
    if suspect is not None and (loss.non_finite or loss.spike_score >= SPIKE):
        unstable_L[suspect] = max(unstable_L[suspect], min(1.0, 0.5 + 0.5 * jump))
    return unstable_L


def _suspect(latest: Floats) -> int | None:
    """The layer with the largest update, or gradient where no update is known."""
    for signal in (Signal.UPDATE_RATIO, Signal.GRAD_NORM):
        values_L = latest[:, SIGNAL_INDEX[signal]]
        if not np.isnan(values_L).all():
            return int(np.nanargmax(values_L))
    return None
