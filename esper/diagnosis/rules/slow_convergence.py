from __future__ import annotations

from statistics import median

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

STEPS = 200
GAIN = 0.01
DIVERGED = 1.1
SMALL_UPDATE = 1e-4


class SlowConvergence(Rule):
    """The run learns next to nothing, and no other rule says why."""

    slug = "slow_convergence"
    title = "Slow convergence"
    symptom = "After 200 steps the loss is still what it was at the start."
    thresholds = (
        Threshold("steps", STEPS, "steps", "chosen"),
        Threshold("loss / first loss, at most", DIVERGED, "ratio", "chosen"),
        Threshold("fall of the loss", GAIN, "share", "AutoTrainer (ICSE'21): gain below 0.01"),
        Threshold("median of update / weight", SMALL_UPDATE, "ratio", "above it, it is info"),
    )
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
            "update_ratio_low", "wrong_output_activation", "wrong_loss", "oscillating_loss",
            "repeated_initialisation", "saturation", "loss_spike", "rate_jump",
        }
    )  # fmt: skip

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if observation.step < STEPS:
            raise Unknown("too few steps")
        if not observation.last_gradients.updates:
            raise Unknown("no update was made")
        if observation.is_warming_up:
            raise Unknown("the learning rate still rises")
        share = observation.learned_share
        if not 1 - GAIN <= share <= DIVERGED:
            return None  # it learns, or it has diverged, which other rules explain
        slow = median(ratio for _, ratio in observation.update_ratios) < SMALL_UPDATE
        return Evidence(
            observed=f"after {observation.step} steps the loss is {share:.1%} of the first",
            limit=f"a fall of more than {GAIN:.0%}",
            signal="loss",
            value=share,
            since_step=1,
            severity=None if slow else Severity.INFO,
        )
