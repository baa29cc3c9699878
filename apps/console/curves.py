"""What a layer and the loss did around a decision, and what is expected of the graft."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from django.utils.translation import gettext as _

from apps.adaptations.models import Adaptation
from apps.console.drawing import Curve, Mark, curve
from apps.console.language import in_words
from apps.telemetry.selectors import layer_series, losses_between, metric_series
from esper.contracts import AdaptationState, SafetyPolicy, Signal
from esper.reward.forecast import LossForecast, forecast_loss

_S = AdaptationState
POINTS = 160
FRAMES = 60
FEW_CASES = 5  # fewer like cases say nothing about the next one
HISTORY_STEPS = 1_000  # before the proposal, at least
FORECAST_STEPS = 2_000  # as many losses as the verdict is based on
_SIGNALS = frozenset(map(str, Signal))
# Measured from 0 to 1: an axis over their own range would make noise look like a change.
_SHARES = frozenset({Signal.HEALTH, Signal.DEAD_FRACTION, Signal.SATURATION, Signal.STABLE_RANK})


def decision_curves(adaptation: Adaptation) -> list[Curve]:
    """The loss, the layer's health and its strongest signal, around the step of the question."""
    run = adaptation.run
    policy = adaptation.safety_policy.safety_policy()
    first = adaptation.proposed_step - max(HISTORY_STEPS, 4 * policy.probation_steps)
    last = last_step(adaptation, policy)
    marks = _marks(adaptation)
    loss = metric_series(run, "loss", points=POINTS, after_step=first, up_to_step=last)
    found = [
        curve(_("loss"), loss["step"], loss["mean"], marks=marks, bounds=(loss["min"], loss["max"]))
    ]
    for signal in (Signal.HEALTH, *_strongest_signal(adaptation)):
        steps, values = layer_series(
            run, adaptation.layer, signal, after_step=first, up_to_step=last, points=FRAMES
        )
        scale = (0.0, 1.0) if signal in _SHARES else None
        found.append(
            curve(
                _("%(signal)s of the layer") % {"signal": in_words(signal.replace("_", " "))},
                steps,
                values,
                marks=marks,
                scale=scale,
            )
        )
    return [picture for picture in found if picture is not None]


def last_step(adaptation: Adaptation, policy: SafetyPolicy) -> int:
    """The last step that concerns an adaptation: a record must not move on with its run."""
    step = adaptation.run.step
    if adaptation.graft_step is not None and adaptation.state != _S.PROBATION:
        observed = adaptation.steps_observed or policy.probation_steps
        return min(step, adaptation.graft_step + 2 * observed)
    if adaptation.ended and adaptation.decided_step is not None:
        return min(step, adaptation.decided_step)
    return step


def _marks(adaptation: Adaptation) -> list[Mark]:
    marks = [Mark(adaptation.proposed_step, _("asked"))]
    if adaptation.decided_step is not None and adaptation.graft_step is None:
        marks.append(Mark(adaptation.decided_step, _("decided")))
    if adaptation.graft_step is not None:
        words = _("applied") if adaptation.remedy else _("grafted")
        marks.append(Mark(adaptation.graft_step, words))
    return marks


def _strongest_signal(adaptation: Adaptation) -> tuple[Signal, ...]:
    reasons = sorted(adaptation.reasons, key=lambda reason: -abs(float(reason.get("weight") or 0)))
    names = [str(reason.get("signal")) for reason in reasons]
    known = [name for name in names if name in _SIGNALS and name != Signal.HEALTH]
    return (Signal(known[0]),) if known else ()


@dataclass(frozen=True, slots=True)
class LikeCases:
    """What earlier grafts of the same blueprint gained against their forecasts."""

    gains: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.gains)

    @property
    def few(self) -> bool:
        return self.count < FEW_CASES

    @property
    def middle(self) -> float:
        return float(np.median(self.gains))

    @property
    def low(self) -> float:
        return float(np.quantile(self.gains, 0.1))

    @property
    def high(self) -> float:
        return float(np.quantile(self.gains, 0.9))


@dataclass(frozen=True, slots=True)
class Expected:
    """The loss after probation without the graft, and what like cases gained."""

    steps: int
    loss: float
    interval: float
    like: LikeCases

    @property
    def low(self) -> float:
        return self.loss - self.interval

    @property
    def high(self) -> float:
        return self.loss + self.interval


def expected(adaptation: Adaptation) -> Expected | None:
    """None where too few losses are known before the decision."""
    policy = adaptation.safety_policy.safety_policy()
    at = adaptation.decided_step or adaptation.graft_step or adaptation.run.step
    forecast = _forecast(adaptation, at, policy)
    if not forecast.known:
        return None
    return Expected(
        policy.probation_steps, forecast.level, forecast.interval, like_cases(adaptation)
    )


def like_cases(adaptation: Adaptation) -> LikeCases:
    earlier = Adaptation.objects.filter(
        blueprint=adaptation.grafted_blueprint, pk__lt=adaptation.pk, forecast_gain__isnull=False
    )
    gains = earlier.order_by("-id").values_list("forecast_gain", flat=True)[:100]
    return LikeCases(tuple(gain for gain in gains if gain is not None))


def _forecast(adaptation: Adaptation, at: int, policy: SafetyPolicy) -> LossForecast:
    first = at - FORECAST_STEPS
    steps, loss = losses_between(adaptation.run, after_step=first, up_to_step=at, taken_back=False)
    ahead = np.arange(at + policy.maturity_steps + 1, at + policy.probation_steps + 1)
    return forecast_loss(steps, loss, ahead)


@dataclass(frozen=True, slots=True)
class Probation:
    """How far a probation is, what the graft gains so far, and what would take it out."""

    steps: int
    of: int
    level: float | None  # mean loss since the graft has warmed up
    forecast: float | None  # of the run without the graft
    interval: float | None
    limit: float | None  # above it, the graft is taken out
    gain: float | None
    ablation: float | None
    picture: Curve | None

    @property
    def percent(self) -> int:
        return min(100, round(100 * self.steps / self.of)) if self.of else 0


def probation(adaptation: Adaptation) -> Probation | None:
    """None before the graft. Uses the numbers and the rule of the verdict."""
    graft = adaptation.graft_step
    if graft is None:
        return None
    policy = adaptation.safety_policy.safety_policy()
    over = adaptation.state != _S.PROBATION
    last = (
        graft + (adaptation.steps_observed or policy.probation_steps)
        if over
        else adaptation.run.step
    )
    since, losses = losses_between(adaptation.run, after_step=graft, up_to_step=last)
    matured = losses[(since > graft + policy.maturity_steps) & np.isfinite(losses)]
    forecast = _forecast(adaptation, graft, policy)
    allowed = policy.max_loss_increase_ratio * abs(forecast.level) + forecast.interval
    limit = forecast.level + allowed if forecast.known else None
    level = float(matured.mean()) if matured.size else None
    gain, interval = adaptation.forecast_gain, adaptation.forecast_interval  # of the verdict
    if gain is None and forecast.known and level is not None:
        gain, interval = forecast.level - level, forecast.interval
    return Probation(
        steps=min(policy.probation_steps, max(0, last - graft)),
        of=policy.probation_steps,
        level=level,
        forecast=forecast.level if forecast.known else None,
        interval=interval,
        limit=limit,
        gain=gain,
        ablation=_newest_ablation(adaptation),
        picture=_picture(adaptation, graft, last, policy, forecast, limit),
    )


def _picture(
    adaptation: Adaptation,
    graft: int,
    last: int,
    policy: SafetyPolicy,
    forecast: LossForecast,
    limit: float | None,
) -> Curve | None:
    first = graft - policy.probation_steps
    loss = metric_series(adaptation.run, "loss", points=POINTS, after_step=first, up_to_step=last)
    band = (forecast.level - forecast.interval, forecast.level + forecast.interval)
    return curve(
        _("loss"),
        loss["step"],
        loss["mean"],
        marks=[Mark(graft, _("grafted"))],
        until=graft + policy.probation_steps,
        band=(graft, *band) if forecast.known else None,
        limit=limit,
    )


def _newest_ablation(adaptation: Adaptation) -> float | None:
    if adaptation.ablation_gain is not None:
        return adaptation.ablation_gain
    name = f"ablation_gain:{adaptation.uid}"
    series = metric_series(adaptation.run, name, points=1_000)
    known = [value for value in series["mean"] if value is not None]
    return known[-1] if known else None
