"""Whether a layer's known signals lie within their usual limits, as one number.

It is one part of a layer's health; :mod:`esper.sdk.layer_health` adds the layer's own past, its
peers, and the open findings.

Shape legend: L layers, S signals.

    score = 1/2 · weighted mean of the known parts + 1/2 · the worst known part

The worst part counts for half, because four good parts do not outweigh one failure (such as every
unit dead). Parts, each 0 poor … 1 good, with their weights:

    update      3   1 while the update ratio lies within [1e-4, 1e-2]; falls to 0 over two decades
                    above. Below, the run's own median sets the bar (a small learning rate is
                    healthy): falls to 0 from 1 to 3 decades under min(1e-3, median)
    dead        3   1 up to 10 % dead units, 0 from 70 % on
    gradient    2   1 within two decades of the layers' median, 0 from four decades on, and where
                    it is exactly 0
    activation  2   0 where the output does not vary at all, else 1
    saturation  2   1 up to 25 % saturated outputs, 0 from 75 % on

A signal that was measured and is not finite (the sampler writes ``inf``) makes its part 0.
Stable rank, gradient SNR and the norms themselves inform the remedy, not the score.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from esper.contracts import SIGNAL_INDEX, Signal

Floats = NDArray[np.float32]

PARTS: dict[str, float] = {
    "update": 3.0,
    "dead": 3.0,
    "gradient": 2.0,
    "activation": 2.0,
    "saturation": 2.0,
}


@np.errstate(all="ignore")  # NaN and inf are valid data here
def health_scores(values: Floats, medians: Floats | None = None) -> Floats:
    """Health of each layer.

    Args:
        values: float32 [L, S], NaN unknown, inf measured and not finite.
        medians: float32 [S] over the run's layers; computed from ``values`` when left out.

    Returns:
        float32 [L], 0 poor … 1 good, NaN where no part is known.
    """
    if medians is None:
        medians = layer_medians(values)
    parts_PL = health_parts(values, medians)
    weights_P1 = np.array(list(PARTS.values()), dtype=np.float32)[:, None]
    known_PL = ~np.isnan(parts_PL)
    weight_L = (weights_P1 * known_PL).sum(axis=0)
    mean_L = (weights_P1 * np.where(known_PL, parts_PL, 0.0)).sum(axis=0) / weight_L
    worst_L = np.where(known_PL, parts_PL, np.inf).min(axis=0)
    return np.where(weight_L > 0, 0.5 * mean_L + 0.5 * worst_L, np.nan).astype(np.float32)


def health_parts(values: Floats, medians: Floats) -> Floats:
    """float32 [parts, L] in the order of ``PARTS``; NaN unknown."""
    parts_PL = np.stack(
        [
            _update_part(_column(values, Signal.UPDATE_RATIO), _one(medians, Signal.UPDATE_RATIO)),
            _falling(_column(values, Signal.DEAD_FRACTION), good=0.1, bad=0.7),
            _gradient_part(_column(values, Signal.GRAD_NORM), _one(medians, Signal.GRAD_NORM)),
            _activation_part(_column(values, Signal.ACT_STD)),
            _falling(_column(values, Signal.SATURATION), good=0.25, bad=0.75),
        ]
    )
    return parts_PL.astype(np.float32)


def layer_medians(values: Floats) -> Floats:
    """float32 [S]: median of the finite values of each signal; NaN where there is none."""
    finite = np.where(np.isfinite(values), values, np.nan)
    return median_of_known(finite).astype(np.float32) if len(values) else finite.sum(0)


def median_of_known(values: Floats) -> Floats:
    """Over the first axis, of the finite values; NaN where there is none.

    ``np.nanmedian`` loops in Python there, and warns; to silence a warning is not safe while
    another thread trains.
    """
    ordered = np.sort(values, axis=0)  # NaN comes last
    count = np.isfinite(values).sum(axis=0, keepdims=True)
    low = np.take_along_axis(ordered, np.maximum((count - 1) // 2, 0), axis=0)
    high = np.take_along_axis(ordered, np.minimum(count // 2, len(values) - 1), axis=0)
    middle: Floats = (0.5 * (low + high))[0]
    return middle


def _column(values: Floats, signal: Signal) -> Floats:
    return values[:, SIGNAL_INDEX[signal]]


def _one(medians: Floats, signal: Signal) -> float:
    return float(medians[SIGNAL_INDEX[signal]])


def _falling(x_L: Floats, *, good: float, bad: float) -> Floats:
    """1 up to ``good``, then a straight line to 0 at ``bad``; NaN stays NaN, inf is 0."""
    part_L: Floats = np.clip((bad - x_L) / (bad - good), 0.0, 1.0)
    return part_L


def _update_part(ratio_L: Floats, median: float) -> Floats:
    decades_L = np.log10(ratio_L)
    usual = min(-3.0, math.log10(median)) if median > 0 else -3.0
    too_high_L = _falling(decades_L, good=-2.0, bad=0.0)
    too_low_L = _falling(np.float32(usual) - decades_L, good=1.0, bad=3.0)
    return np.minimum(too_high_L, too_low_L)


def _gradient_part(norm_L: Floats, median: float) -> Floats:
    """A gradient of exactly zero was measured, and is as poor as one that is not finite."""
    extreme_L = np.isinf(norm_L) | (norm_L == 0)
    if not median > 0:
        return np.where(extreme_L, np.float32(0.0), np.float32(np.nan))
    decades_L: Floats = np.abs(np.log10(norm_L) - np.float32(np.log10(median)))
    return np.where(extreme_L, np.float32(0.0), _falling(decades_L, good=2.0, bad=4.0))


def _activation_part(std_L: Floats) -> Floats:
    good_L = (np.isfinite(std_L) & (std_L > 0)).astype(np.float32)
    return np.where(np.isnan(std_L), np.float32(np.nan), good_L)
