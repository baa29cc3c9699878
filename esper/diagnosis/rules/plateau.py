from __future__ import annotations

import math

from esper.contracts import Severity
from esper.contracts.percent import percent, signed
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown
from esper.health.features import loss_features

WINDOW = 1_000
LONG = 2_000
FALL = 0.005
CLEAR = 0.01
SURE = 0.01
LITTLE_LEARNED = 0.5
BETTER = 0.005


class Plateau(Rule):
    """The loss has no trend over a long window, judged by the run's own noise and schedule."""

    slug = "plateau"
    title = "The loss is on a plateau"
    symptom = "Over thousands of steps the loss has not fallen, though its noise would show a fall."
    thresholds = (
        Threshold("steps without a fall", WINDOW, "steps", "chosen: shorter ones were false"),
        Threshold(
            "fall over the window", FALL, "share of the level", "chosen: smallest that matters"
        ),
        Threshold(
            "change that ends it", CLEAR, "share of the level", "the noise that is allowed: SURE"
        ),
        Threshold("uncertainty of that fall", SURE, "share of the level", "two standard errors"),
        Threshold("loss / first loss", LITTLE_LEARNED, "ratio", "below it, it is info"),
    )
    severity = Severity.CAUTION
    false_alarm = "A task that is learned suddenly after a long time, such as parity."
    advice = (
        "Try another learning rate first; if that changes nothing, the model may be too small "
        "where it is narrowest."
    )
    remedies = (RemedySlug.SET_LR, RemedySlug.SPAN, RemedySlug.BLOCK, RemedySlug.ADAPTER)
    opens_after = 2
    explained_by = frozenset(
        {
            "non_finite", "nothing_moves", "dying_relu", "vanishing_gradient", "update_ratio_low",
            "clipped_to_nothing",
            "update_ratio_high", "over_fitting", "memorised_noise", "slow_convergence",
            "wrong_output_activation", "wrong_loss", "rate_vanished",
            "weight_decay_high", "constant_output",
        }
    )  # fmt: skip

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        steps, losses = observation.finite_losses()
        span = int(steps[-1] - steps[0]) + 1
        if span < 2 * WINDOW:
            raise Unknown(f"fewer than {2 * WINDOW} steps")
        if observation.gradients and not observation.last_gradients.updates:
            raise Unknown("no update was made")
        if observation.is_warming_up:
            raise Unknown("the learning rate still rises")
        features = loss_features(steps, losses)
        middle = (steps[-1] + steps[len(steps) // 2]) / 2 + 1
        # features.exponent is -slope * middle / level: back to the fall over the window.
        window = float(steps[-1] - steps[len(steps) // 2])
        fall = features.exponent * window / middle
        error = features.exponent_error * window / middle
        if math.isnan(fall) or 2 * error > SURE:
            raise Unknown("the noise hides whether the loss falls")
        # Near the limit the noise of the trend would end the finding and open it again.
        if abs(fall) >= (CLEAR if memory.is_open else FALL) or self._held_out_improves(observation):
            return None
        first = observation.first_training_loss
        little = span >= 2 * LONG - WINDOW and features.level > LITTLE_LEARNED * abs(first)
        decayed = observation.rate_share < LITTLE_LEARNED
        return Evidence(
            observed=f"the loss has been {features.level:.4g} for {window:,.0f} steps; its trend "
            f"is {signed(-fall)} with an error of {percent(error)}"
            + ("; the schedule has lowered the learning rate" if decayed else ""),
            limit=f"a fall of {FALL:.1%}",
            signal="loss",
            value=fall,
            since_step=int(steps[len(steps) // 2]),
            severity=Severity.CAUTION if little and not decayed else Severity.INFO,
        )

    def _held_out_improves(self, observation: Observation) -> bool:
        losses = [loss for _, loss in observation.held_out if math.isfinite(loss)]
        if len(losses) < 4:
            return False
        quarter = max(1, len(losses) // 4)
        return min(losses[-quarter:]) < (1 - BETTER) * min(losses[:-quarter])
