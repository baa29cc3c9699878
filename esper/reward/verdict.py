"""The verdict at the end of probation: keep the graft, or roll it back.

    window not full and deadline not reached   -> None, wait
    too few received losses at the deadline    -> roll back: no data is never success
    losses after the graft not finite          -> roll back
    worse than the forecast by more than the policy allows, beyond the interval -> roll back
    the graft only observes                    -> keep, it costs next to nothing
    the graft makes its layer cheaper          -> keep where the held-out loss without it is at
                                                  most 1 % of the loss better; see below
    ablation known and not > 0                 -> roll back: the host does not use it
    clearly worse than the forecast            -> roll back
    else                                       -> keep

Ablation alone overrates grafts that the host has come to depend on, and before/after overrates a
graft while the loss falls anyway; so both must agree.

A graft that makes its layer cheaper cannot improve the loss; at best the loss stays the same. It is
judged by its cost, and both numbers must stay within the tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from esper.contracts import GraftKind, SafetyPolicy, Verdict
from esper.reward.forecast import LossForecast, forecast_loss, usable

FORWARD_UNCHANGED = frozenset({GraftKind.OBSERVE, GraftKind.WRAP, GraftKind.DISTRIBUTED})
CHEAPER = frozenset({GraftKind.REPLACE})
MIN_OBSERVED = 8  # fewer losses give no useful mean
CHEAPER_TOLERANCE = 0.01  # share of the loss that a cheaper layer may cost


@dataclass(frozen=True, slots=True, eq=False)
class LossWindow:
    """Received losses. Shape legend: T samples."""

    steps: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    loss: NDArray[np.float64] = field(default_factory=lambda: np.empty(0, dtype=np.float64))

    def split(self, step: int) -> tuple[LossWindow, LossWindow]:
        """(samples up to and including ``step``, samples after it)."""
        before = self.steps <= step
        return (
            LossWindow(self.steps[before], self.loss[before]),
            LossWindow(self.steps[~before], self.loss[~before]),
        )


def judge(
    before: LossWindow,
    after: LossWindow,
    *,
    graft_step: int,
    policy: SafetyPolicy,
    kind: GraftKind,
    ablation_gain: float = math.nan,
    deadline_reached: bool = False,
) -> Verdict | None:
    """Judges a graft in probation.

    Args:
        before: losses of the unchanged run, up to ``graft_step``.
        after: losses since. The first ``maturity_steps`` do not count: a new graft warms up.
        graft_step: step at which it was grafted.
        policy: maturity, window and allowed increase.
        kind: an observing graft is kept unless harmful; one that makes a layer cheaper, unless
            it costs more than ``CHEAPER_TOLERANCE`` of the loss.
        ablation_gain: held-out loss without the graft minus with it; NaN unknown.
        deadline_reached: judge now, with the losses received so far.

    Returns:
        None while the window is not full.
    """
    matured = after.steps > graft_step + policy.maturity_steps
    steps_U, loss_U = after.steps[matured], after.loss[matured]
    observed = int(steps_U[-1] - graft_step) if len(steps_U) else 0
    broken = len(loss_U) > 0 and not usable(loss_U).all()
    # The window starts at the graft, as a person reads "verdict after 150 steps".
    full = observed >= policy.probation_steps and len(steps_U) >= MIN_OBSERVED
    if not (full or broken or deadline_reached):
        return None
    if broken:
        return Verdict(False, "The loss is not finite.", ablation_gain, steps_observed=observed)
    if len(steps_U) < MIN_OBSERVED:
        reason = f"No data: {len(steps_U)} losses after maturity, {MIN_OBSERVED} are needed."
        return Verdict(False, reason, ablation_gain, steps_observed=observed)
    if kind in FORWARD_UNCHANGED:
        ablation_gain = math.nan  # on and off compute the same, so 0 would be no evidence
    forecast = forecast_loss(before.steps, before.loss, steps_U)
    level = float(loss_U.mean())
    keep, reason = _answer(level, forecast, ablation_gain, policy, kind)
    return Verdict(
        keep=keep,
        reason=reason,
        ablation_gain=ablation_gain,
        forecast_gain=forecast.level - level,
        forecast_interval=forecast.interval,
        steps_observed=observed,
    )


def _answer(
    level: float,
    forecast: LossForecast,
    ablation_gain: float,
    policy: SafetyPolicy,
    kind: GraftKind,
) -> tuple[bool, str]:
    gain, interval = forecast.level - level, forecast.interval
    allowed = policy.max_loss_increase_ratio * abs(forecast.level)
    harmful = forecast.known and -gain > allowed + interval
    if harmful:
        return False, f"Harmful: the loss is {-gain:.4g} above its forecast (± {interval:.2g})."
    if kind is GraftKind.OBSERVE:
        return True, "It only observes and does no harm."
    if kind in CHEAPER:
        return _answer_cheaper(level, forecast, ablation_gain)
    if math.isfinite(ablation_gain) and ablation_gain <= 0:
        return False, f"Without it the held-out loss is no worse (ablation {ablation_gain:+.4g})."
    if not forecast.known:
        return _without_forecast(ablation_gain)
    if gain < -interval:
        return False, f"The loss is {-gain:.4g} above its forecast (± {interval:.2g})."
    return True, _praise(gain, interval, ablation_gain)


def _answer_cheaper(level: float, forecast: LossForecast, ablation_gain: float) -> tuple[bool, str]:
    allowed = CHEAPER_TOLERANCE * abs(forecast.level if forecast.known else level)
    within = f"a cheaper layer may cost {CHEAPER_TOLERANCE:.0%} of the loss, {allowed:.2g}"
    if math.isfinite(ablation_gain) and -ablation_gain > allowed:
        return False, f"It costs {-ablation_gain:.4g} of held-out loss; {within}."
    if not (forecast.known or math.isfinite(ablation_gain)):
        return False, "No data: neither a forecast nor an ablation is known."
    excess = level - forecast.level
    if forecast.known and excess > allowed + forecast.interval:
        return (
            False,
            f"The loss is {excess:.4g} above its forecast (± {forecast.interval:.2g}); {within}.",
        )
    costs = f"{max(0.0, -ablation_gain):.4g} of held-out loss"
    cost = (
        costs if math.isfinite(ablation_gain) else "nothing beyond its forecast; ablation unknown"
    )
    return True, f"It makes the layer cheaper and costs {cost}; {within}."


def _without_forecast(ablation_gain: float) -> tuple[bool, str]:
    """Too few losses before the graft for a forecast: only ablation decides."""
    if math.isfinite(ablation_gain):
        return True, f"Ablation gain {ablation_gain:+.4g}; too little history for a forecast."
    return False, "No data: neither a forecast nor an ablation is known."


def _praise(gain: float, interval: float, ablation_gain: float) -> str:
    against = f"{gain:+.4g} ± {interval:.2g} against the forecast"
    if math.isfinite(ablation_gain):
        return f"It improves the loss: ablation {ablation_gain:+.4g}, {against}."
    return f"It does no harm: {against}; ablation unknown."
