from __future__ import annotations

from statistics import fmean, median

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.facts import LossKind
from esper.diagnosis.observation import CAME_TRAINED, Observation, Unknown

STEPS = 200
GAIN = 0.01
DIVERGED = 1.1
SMALL_UPDATE = 1e-4
LONG, GUESSES = 600, 100
GUESSING, ALIKE = 0.98, 1e-3
WORSE = 1.1
_ESTIMATED = (
    "Leave lr at 1: the optimizer estimates the rate, and its estimate has not grown. Give it a "
    "larger d0 or d_coef, and no warm-up of your own."
)
_TOO_FAR = (
    "The loss is higher than that of guessing: lower the learning rate or the momentum, and check "
    "that the labels fit the inputs."
)


class SlowConvergence(Rule):
    """The run learns next to nothing, and no other rule says why."""

    slug = "slow_convergence"
    title = "Slow convergence"
    symptom = "After 200 steps the loss is still what it was at the start."
    thresholds = (
        Threshold("steps", STEPS, "steps", "chosen"),
        Threshold("loss / first loss, at most", DIVERGED, "ratio", "chosen"),
        Threshold("fall of the loss", GAIN, "share", "AutoTrainer (ICSE'21): gain below 0.01"),
        Threshold(
            "first losses / that of guessing", CAME_TRAINED, "ratio",
            "chosen: below it the model was trained before, and may be at its end",
        ),
        Threshold("median of update / weight", SMALL_UPDATE, "ratio", "above it, it is info"),
        Threshold("steps until a run that guesses is told", LONG, "steps", "chosen"),
        Threshold(
            f"mean of {GUESSES} losses / that of guessing",
            GUESSING,
            "ratio",
            "chosen: whatever the first loss was and however large updates are",
        ),
        Threshold("the same, above which the advice is a lower rate", WORSE, "ratio", "chosen"),
        Threshold(
            "spread of the outputs of a batch",
            ALIKE,
            "share of their size",
            "chosen: the same answer to each input, where some classes are rare",
        ),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "A task that is learned suddenly after a long time, such as parity."
    advice = (
        "Try a higher learning rate, or another optimizer; check that the labels fit the inputs."
    )
    remedies = (RemedySlug.MATCH_UPDATES, RemedySlug.SET_LR, RemedySlug.TELL)
    opens_after = 2
    explained_by = frozenset(
        {
            "non_finite", "nothing_moves", "not_held", "unreached", "frozen_part", "dying_relu",
            "vanishing_gradient", "exploding_gradient", "bad_initialisation", "update_ratio_high",
            "update_ratio_low",
            "clipped_to_nothing", "wrong_output_activation", "wrong_loss", "oscillating_loss",
            "repeated_initialisation", "saturation", "loss_spike", "rate_jump", "rate_vanished",
            "weight_decay_high", "constant_output", "no_gradient",
        }
    )  # fmt: skip

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if min(observation.step, len(observation.losses)) < STEPS:
            raise Unknown("too few steps")  # of these weights
        if not observation.last_gradients.updates:
            raise Unknown("no update was made")
        if observation.is_warming_up:
            raise Unknown("the learning rate still rises")
        if guesses := _guesses(observation):
            return guesses
        share = observation.learned_share
        if observation.came_trained or not 1 - GAIN <= share <= DIVERGED:
            return None  # it learns, or it has diverged, which other rules explain
        slow = median(ratio for _, ratio in observation.update_ratios) < SMALL_UPDATE
        return Evidence(
            observed=f"after {observation.step:,} steps the loss is {share:.1%} of the first",
            limit=f"a fall of more than {GAIN:.0%}",
            signal="loss",
            value=share,
            since_step=1,
            severity=None if slow else Severity.INFO,
            advice=_ESTIMATED if observation.estimates_rate else "",
        )


def _guesses(observation: Observation) -> Evidence | None:
    """Nothing was learned in a long time, though the loss may have fallen from a bad start."""
    losses = observation.finite_losses()[1]
    if observation.step < LONG or len(losses) < GUESSES or not observation.passes:
        return None
    seen = observation.last_pass
    if seen.loss_kind is not LossKind.CROSS_ENTROPY:
        return None  # the loss of guessing is not known
    level, chance = fmean(losses[-GUESSES:]), seen.guessing_loss
    advice = _TOO_FAR if level >= WORSE * chance else ""
    if level >= GUESSING * chance:
        observed = f"the loss is {level:.4g}, and that of guessing {chance:.4g}"
        limit, value = f"below {GUESSING:.0%} of it", level / chance
    elif seen.output_spread < ALIKE:  # guessing is better than that where classes are not alike
        observed = f"the outputs of a batch differ by {seen.output_spread:.1e} of their size"
        limit, value = f"at least {ALIKE:g}", seen.output_spread
    else:
        return None
    return Evidence(
        observed=f"after {observation.step:,} steps {observed}",
        limit=limit,
        signal="loss",
        value=value,
        since_step=1,
        advice=advice,
        certain=True,  # a mean of so many losses
        only_tell=True,  # updates are of a usual size, so no rate is known to be better
    )
