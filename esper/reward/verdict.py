"""The verdict on a graft in probation: a sequential test, which may be asked at every step.

Evidence: looks, each of which measures the held-out loss with the graft and without it on the same
batches; and the training loss against the forecast of the unchanged run.

    a loss is not finite                                    -> take out
    worse than the forecast by more than the policy allows, beyond the interval -> take out
    the graft is not there for the loss (it observes, or limits gradients) -> keep
    the interval of the gain is above the smallest that matters, and so is the gain now -> keep
    the interval of the gain is below zero, and the gain does not rise to zero before the cap
                                                            -> take out
    neither, and the cap of steps is not reached            -> look again
    the cap, or the deadline                                -> take out: no gain was shown

The gain is a share of the held-out loss. Its interval holds at all looks together; see
:mod:`esper.reward.sequence`. Looks during the graft's warm-up do not count. A newborn still learns
after it, and each newborn differs, so the test begins three times: after the warm-up, and again at
three and six tenths of the time to the cap. A gain that one of the three shows is shown (each has a
third of the error, Bonferroni). A gain that rises gets all the time up to the cap, because the
lines through the looks say where it will be.

Ablation alone overrates grafts that the host has come to depend on, and before/after overrates a
graft while the loss falls anyway; so a graft that is below its forecast is not kept.

A graft that makes its layer cheaper cannot improve the loss; at best the loss stays the same. It is
kept when the interval shows that it costs at most ``CHEAPER_TOLERANCE``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from esper.contracts import GraftKind, RunningTest, SafetyPolicy, Verdict
from esper.contracts.percent import percent, signed
from esper.contracts.protocol import StepValues
from esper.reward.forecast import LossForecast, forecast_loss, usable
from esper.reward.sequence import ALPHA, FEWEST, Trend, trend_at_every_look

FORWARD_UNCHANGED = frozenset({GraftKind.OBSERVE, GraftKind.WRAP, GraftKind.DISTRIBUTED})
CHEAPER = frozenset({GraftKind.REPLACE})
BEGINNINGS = (0.0, 0.3, 0.6)  # of the test, shares of the time from the warm-up to the cap
LARGEST_SHARE = 1e6  # a larger gain counts as so much; squares of it can be summed
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


@dataclass(frozen=True, slots=True)
class Look:
    """The held-out loss with a graft and without it, on the same batches.

    Attributes:
        gain: the loss without it minus the loss with it.
        loss: without it.
    """

    step: int
    gain: float
    loss: float

    @property
    def share(self) -> float:
        """The gain as a share of the loss without the graft; NaN: unknown."""
        if not self.loss or not math.isfinite(self.gain) or not math.isfinite(self.loss):
            return math.nan
        share = self.gain / abs(self.loss)
        return max(-LARGEST_SHARE, min(LARGEST_SHARE, share))


GAIN, LOSS = "ablation_gain:", "ablation_loss:"  # and the id: what a trainer names its looks


def looks_of(metrics: Iterable[StepValues], uid: str) -> tuple[Look, ...]:
    """What a trainer has reported of one graft, in the order of ``metrics``."""
    gain, loss = GAIN + uid, LOSS + uid
    return tuple(
        Look(item.step, item.values[gain], item.values.get(loss, math.nan))
        for item in metrics
        if gain in item.values
    )


def held_out_level(looks: Sequence[Look]) -> float:
    """Mean held-out loss without the graft; NaN: unknown."""
    known = [abs(look.loss) for look in looks if math.isfinite(look.loss)]
    return float(np.mean(known)) if known else math.nan


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judge says now; ``verdict`` None: look again."""

    verdict: Verdict | None
    test: RunningTest


@dataclass(frozen=True, slots=True)
class _Evidence:
    """All that the answer depends on.

    Attributes:
        trends: of the gain as a share of the loss, for each beginning with enough looks; at least
            one.
    """

    trends: tuple[Trend, ...]
    forecast: LossForecast
    level: float
    policy: SafetyPolicy
    looks: int
    steps_left: int
    last_chance: bool

    @property
    def trend(self) -> Trend:
        """The one that shows most."""
        return max(self.trends, key=lambda trend: trend.interval.low)

    @property
    def falls_short(self) -> bool:
        """The gain is shown to be below zero, and does not get above it before the cap."""
        lines = [trend.after(self.steps_left) for trend in self.trends]
        return self.trends[0].interval.high < 0 and max(lines) < 0

    @property
    def gain(self) -> float:
        """Of the training loss, against its forecast."""
        return self.forecast.level - self.level

    @property
    def below_forecast(self) -> bool:
        return self.forecast.known and self.gain < -self.forecast.interval


def judge(
    before: LossWindow,
    after: LossWindow,
    *,
    graft_step: int,
    policy: SafetyPolicy,
    kind: GraftKind,
    looks: Sequence[Look] = (),
    serves_loss: bool = True,
    deadline_reached: bool = False,
) -> Judgement:
    """Judges a graft in probation.

    Args:
        before: losses of the unchanged run, up to ``graft_step``.
        after: losses since. The first ``maturity_steps`` do not count: a new graft warms up.
        graft_step: step at which it was grafted.
        policy: warm-up, cap, smallest gain and allowed increase.
        kind: what leaves the forward pass unchanged is kept unless harmful.
        looks: at the held-out loss, oldest first; unknown ones are left out.
        serves_loss: False for a capacity limit or a balancer, which is kept unless harmful.
        deadline_reached: judge now, with what was received so far.
    """
    matured = after.steps > graft_step + policy.maturity_steps
    steps_U, loss_U = after.steps[matured], after.loss[matured]
    observed = max(0, int(after.steps[-1]) - graft_step) if len(after.steps) else 0
    aims_at_gain = serves_loss and kind not in FORWARD_UNCHANGED
    counted = _counted(looks, graft_step, policy) if aims_at_gain else []
    known = len(loss_U) >= MIN_OBSERVED and bool(usable(loss_U).all())
    forecast = forecast_loss(before.steps, before.loss, steps_U) if known else _UNKNOWN
    evidence = _Evidence(
        trends=_trends(counted, graft_step, policy),
        forecast=forecast,
        level=float(loss_U.mean()) if known else math.nan,
        policy=policy,
        looks=len(counted),
        steps_left=max(0, policy.probation_steps - observed),
        last_chance=deadline_reached or observed >= policy.probation_steps,
    )
    test = _running_test(evidence, observed, kind)
    broken = len(loss_U) > 0 and not usable(loss_U).all()
    answer: tuple[bool, str] | None
    if broken:
        answer = False, "The loss is not finite."
    elif known:
        answer = _answer(evidence, kind, aims_at_gain=aims_at_gain)
    elif deadline_reached:
        wanted = f"{len(loss_U)} losses after maturity, {MIN_OBSERVED} are needed"
        answer = False, f"No data: {wanted}."
    else:
        answer = None
    if answer is None:
        return Judgement(None, test)
    return Judgement(_verdict(answer, evidence, counted, observed), test)


_UNKNOWN = LossForecast(math.nan, math.nan)


def _counted(looks: Sequence[Look], graft_step: int, policy: SafetyPolicy) -> list[Look]:
    """Those after the warm-up that measured something."""
    begins = graft_step + policy.maturity_steps
    return [look for look in looks if look.step > begins and math.isfinite(look.share)]


def _trends(counted: Sequence[Look], graft_step: int, policy: SafetyPolicy) -> tuple[Trend, ...]:
    """Of the looks since each beginning of the test; of all looks where there are few."""
    length = policy.probation_steps - policy.maturity_steps
    begins = [graft_step + policy.maturity_steps + share * length for share in BEGINNINGS]
    windows = [[look for look in counted if look.step > begin] for begin in begins]
    enough = [window for window in windows if len(window) >= FEWEST]
    return tuple(_trend(window) for window in enough or windows[:1])


def _trend(window: Sequence[Look]) -> Trend:
    steps_T = np.array([look.step for look in window], dtype=np.int64)
    shares_T = np.array([look.share for look in window])
    return trend_at_every_look(steps_T, shares_T, alpha=ALPHA / len(BEGINNINGS))


def _answer(evidence: _Evidence, kind: GraftKind, *, aims_at_gain: bool) -> tuple[bool, str] | None:
    """(keep, reason); None: look again."""
    gain, interval = evidence.gain, evidence.forecast.interval
    allowed = evidence.policy.max_loss_increase_ratio * abs(evidence.forecast.level)
    if evidence.forecast.known and -gain > allowed + interval:
        return False, f"Harmful: the loss is {-gain:.4g} above its forecast (± {interval:.2g})."
    if kind is GraftKind.OBSERVE:
        return True, "It only observes and does no harm."
    if not aims_at_gain:
        return _answer_harmless(evidence) if evidence.last_chance else None
    if kind in CHEAPER:
        return _answer_cheaper(evidence)
    return _answer_gain(evidence)


def _answer_harmless(evidence: _Evidence) -> tuple[bool, str]:
    """At the cap: what is not there for the loss has to do no harm to it."""
    if not evidence.forecast.known:
        return False, "No data: no forecast is known."
    if evidence.below_forecast:
        return False, _below(evidence)
    return True, f"It does no harm: {_against(evidence)}; it cannot be tried on and off."


def _answer_gain(evidence: _Evidence) -> tuple[bool, str] | None:
    low = evidence.trend.interval.low
    needed, now = evidence.policy.min_gain_ratio, evidence.trend.now
    if low > needed and now > needed and not evidence.below_forecast:
        return True, f"It lowers the held-out loss: {_shown(evidence)}."
    if evidence.falls_short:
        return False, f"Without it the held-out loss is better: {_shown(evidence)}."
    if not evidence.last_chance:
        return None
    if evidence.looks == 0:
        return _without_looks(evidence)
    if low > needed and evidence.below_forecast:
        return False, f"{_below(evidence)} The host depends on it: {_shown(evidence)}."
    if low > needed:
        return (
            False,
            f"Its gain has gone: {signed(now)} at the last look; {_shown(evidence)}.",
        )
    if evidence.looks < FEWEST:
        return False, f"No data: {evidence.looks} looks after maturity, {FEWEST} are needed."
    return False, f"No gain above {percent(needed)} was shown: {_shown(evidence)}."


def _without_looks(evidence: _Evidence) -> tuple[bool, str]:
    """At the cap, without a held-out loss: only the forecast of the training loss is left."""
    if not evidence.forecast.known:
        return False, "No data: neither a forecast nor a held-out loss is known."
    needed = evidence.policy.min_gain_ratio
    if evidence.gain - evidence.forecast.interval > needed * abs(evidence.forecast.level):
        return True, f"It lowers the training loss: {_against(evidence)}; no held-out loss."
    return (
        False,
        f"No gain above {percent(needed)} was shown: {_against(evidence)}; no held-out loss.",
    )


def _answer_cheaper(evidence: _Evidence) -> tuple[bool, str] | None:
    low = evidence.trend.interval.low
    within = f"a cheaper layer may cost {percent(CHEAPER_TOLERANCE)} of the loss"
    if evidence.trends[0].interval.high < -CHEAPER_TOLERANCE:
        return False, f"It costs held-out loss: {_shown(evidence)}; {within}."
    over = _excess(evidence) > CHEAPER_TOLERANCE
    if low > -CHEAPER_TOLERANCE and not over:
        return True, f"It makes the layer cheaper: {_shown(evidence)}; {within}."
    if not evidence.last_chance:
        return None
    if evidence.looks:
        lasting = _below(evidence) if over else f"Its cost is not known: {_shown(evidence)}."
        return False, f"{lasting} Here {within}."
    if not evidence.forecast.known:
        return False, "No data: neither a forecast nor a held-out loss is known."
    if over:
        return False, f"{_below(evidence)} Here {within}."
    return True, f"It makes the layer cheaper: {_against(evidence)}; {within}."


def _excess(evidence: _Evidence) -> float:
    """Share of the loss by which it is above its forecast, beyond the interval."""
    if not evidence.forecast.known or not evidence.forecast.level:
        return 0.0
    return (-evidence.gain - evidence.forecast.interval) / abs(evidence.forecast.level)


def _shown(evidence: _Evidence) -> str:
    interval = evidence.trend.interval
    if not interval.known:
        return f"gain {signed(interval.mean)}, too few looks ({evidence.looks}) for an interval"
    return (
        f"gain {signed(interval.mean)} (95%: {signed(interval.low)} to {signed(interval.high)}, "
        f"{evidence.looks} looks)"
    )


def _against(evidence: _Evidence) -> str:
    return f"{evidence.gain:+.4g} ± {evidence.forecast.interval:.2g} against the forecast"


def _below(evidence: _Evidence) -> str:
    forecast = evidence.forecast
    return f"The loss is {-evidence.gain:.4g} above its forecast (± {forecast.interval:.2g})."


def _running_test(evidence: _Evidence, observed: int, kind: GraftKind) -> RunningTest:
    interval, forecast = evidence.trend.interval, evidence.forecast
    share = 1.0 / abs(forecast.level) if forecast.known and forecast.level else math.nan
    return RunningTest(
        steps=observed,
        most_steps=evidence.policy.probation_steps,
        looks=evidence.looks,
        gain=interval.mean,
        gain_low=interval.low if interval.known else math.nan,
        gain_high=interval.high if interval.known else math.nan,
        keep_above=-CHEAPER_TOLERANCE if kind in CHEAPER else evidence.policy.min_gain_ratio,
        out_below=-CHEAPER_TOLERANCE if kind in CHEAPER else 0.0,
        forecast_gain=evidence.gain * share,
        forecast_interval=forecast.interval * share,
    )


def _verdict(
    answer: tuple[bool, str], evidence: _Evidence, counted: Sequence[Look], observed: int
) -> Verdict:
    """With the numbers in units of the loss."""
    interval = evidence.trend.interval
    level = held_out_level(counted)
    return Verdict(
        keep=answer[0],
        reason=answer[1],
        ablation_gain=interval.mean * level,
        ablation_low=interval.low * level if interval.known else math.nan,
        ablation_high=interval.high * level if interval.known else math.nan,
        forecast_gain=evidence.gain,
        forecast_interval=evidence.forecast.interval,
        steps_observed=observed,
    )
