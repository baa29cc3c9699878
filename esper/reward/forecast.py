"""Forecasts the loss of the unchanged run by extrapolating its curve, with an interval.

The loss falls without a graft too, so "lower than before" is no gain. The curve before the graft is
fitted as a straight line of log loss over log step (loss ~ c · step^-alpha, the shape of most
training curves), robustly, and read at the steps after the graft.

Shape legend: T samples before, U samples after, B blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Steps = NDArray[np.int64]

MIN_SAMPLES = 16
LARGEST_LOSS = 1e100  # above, it counts as infinite
BLOCKS = 16
Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class LossForecast:
    """Mean loss of the unchanged run over the steps after the graft.

    ``interval`` is the half width at 95 %, of the difference to an observed mean over the same
    number of samples; both are NaN if there are too few samples.
    """

    level: float
    interval: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.level) and math.isfinite(self.interval)


def forecast_loss(steps_T: Steps, loss_T: Doubles, steps_U: Steps) -> LossForecast:
    """Extrapolates the loss before the graft to the steps after it.

    Args:
        steps_T, loss_T: before the graft; non-finite losses are left out.
        steps_U: steps of the forecast.

    Returns:
        The forecast's mean over ``steps_U``; NaN below ``MIN_SAMPLES`` samples.
    """
    usable_T = usable(loss_T)
    steps_T, loss_T = steps_T[usable_T], loss_T[usable_T]
    if len(loss_T) < MIN_SAMPLES or not len(steps_U):
        return LossForecast(math.nan, math.nan)
    logs = bool((loss_T > 0).all())
    x_B, y_B, sizes_B = _blocks(_axis(steps_T), np.log(loss_T) if logs else loss_T)
    slope, middle = _theil_sen(x_B, y_B)
    # A fit can predict a rising loss; for the unchanged run, a constant loss is assumed instead.
    slope = min(slope, 0.0)
    centre = float(np.median(y_B - slope * x_B))
    predicted = centre + slope * float(_axis(steps_U).mean())
    error = _prediction_error(x_B, y_B - (centre + slope * x_B), sizes_B, steps_U)
    if not logs:
        return LossForecast(predicted, Z_95 * error)
    # The mean of logs is the log of the geometric mean; the comparison uses the arithmetic mean.
    level = math.exp(predicted) * _arithmetic_over_geometric(loss_T, middle)
    return LossForecast(level, Z_95 * error * level)


def usable(loss_T: Doubles) -> NDArray[np.bool_]:
    """Losses that are finite and small enough to sum; sums of the largest doubles are infinite."""
    return np.abs(loss_T) < LARGEST_LOSS


def _axis(steps: Steps) -> Doubles:
    """log step; a run's first step counts as 1."""
    return np.log(np.maximum(steps, 0).astype(np.float64) + 1.0)


def _blocks(x_T: Doubles, y_T: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Means of consecutive blocks, and their sizes."""
    blocks = min(BLOCKS, len(y_T) // 4)
    edges = np.linspace(0, len(y_T), blocks + 1).astype(int)[:-1]
    sizes_B = np.diff(np.append(edges, len(y_T))).astype(np.float64)
    return np.add.reduceat(x_T, edges) / sizes_B, np.add.reduceat(y_T, edges) / sizes_B, sizes_B


def _theil_sen(x_B: Doubles, y_B: Doubles) -> tuple[float, float]:
    """(slope, middle of x): median of the slopes of all pairs (Sen 1968)."""
    i, j = np.triu_indices(len(x_B), 1)
    run = x_B[j] - x_B[i]
    rising = run > 0
    slope = float(np.median((y_B[j] - y_B[i])[rising] / run[rising])) if rising.any() else 0.0
    return slope, float(np.median(x_B))


def _prediction_error(x_B: Doubles, residual_B: Doubles, sizes_B: Doubles, steps_U: Steps) -> float:
    """Standard error of (mean observed - mean predicted) at the new steps."""
    scatter = 1.4826 * float(np.median(np.abs(residual_B - np.median(residual_B))))
    per_sample = scatter * math.sqrt(float(np.median(sizes_B)))
    spread = float(((x_B - x_B.mean()) ** 2).sum())
    distance = float(_axis(steps_U).mean() - x_B.mean())
    line = scatter**2 * (1.0 / len(x_B) + (distance**2 / spread if spread > 0 else 0.0))
    return math.sqrt(line + per_sample**2 / len(steps_U))


def _arithmetic_over_geometric(loss_T: Doubles, middle: float) -> float:
    recent = loss_T[len(loss_T) // 2 :]
    return float(recent.mean() / np.exp(np.log(recent).mean()))
