from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.facts import ModelPass
from esper.diagnosis.observation import Observation, Unknown

FAR = 20.0
UNCHANGED = 0.8
STEP, PASSES = 30, 2
SQUARES = 0.01  # distance of their weights from those of a mean


class TargetsFar(Rule):
    """The targets are far larger than the outputs, which come nearer by one rate in each update."""

    slug = "targets_far"
    title = "The targets are far from the outputs"
    symptom = (
        "The error of the outputs is many times their own size, and an optimizer such as Adam "
        "moves them no faster for that."
    )
    thresholds = (
        Threshold("error / largest output", FAR, "ratio", "chosen: 1 for targets of unit spread"),
        Threshold("training loss", UNCHANGED, "of the first", "chosen"),
        Threshold("from step", STEP, "steps", "chosen"),
        Threshold("observed forward passes", PASSES, "in a row", "chosen"),
        Threshold("weight of a square in the loss", SQUARES, "distance from a mean", "rounding"),
    )
    severity = Severity.CAUTION
    false_alarm = "A few targets that are far larger than all others."
    advice = (
        "Subtract the mean of the targets and divide by their standard deviation, and do the "
        "opposite with the answers; or set the last bias to the mean, and raise the learning rate."
    )
    closes_after = 1
    explained_by = frozenset({"non_finite", "nothing_moves", "update_ratio_high", "rate_jump"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if observation.follows_gradient or observation.searches:
            return None  # a large error makes a large gradient, and so a large update
        recent = [seen for seen in observation.passes[-PASSES:] if seen.step >= STEP]
        if len(recent) < PASSES:
            raise Unknown("too few forward passes were observed")
        if observation.learned_share < UNCHANGED:
            return None
        error, size = _error(observation, recent[-1]), _size(recent[-1])
        if min(_error(observation, seen) / _size(seen) for seen in recent) < FAR:
            return None
        return Evidence(
            observed=f"after {recent[-1].step:,} steps the outputs are {size:.3g} at most, and the "
            f"error is {error:.3g}",
            limit=f"an error below {FAR:g} times the largest output",
            signal="loss",
            value=error / size,
            since_step=observation.first_pass.step,
        )


def _error(observation: Observation, seen: ModelPass) -> float:
    """Root of the mean squared error. Raises ``Unknown`` where the loss is another."""
    if abs(observation.squares_in_loss(seen) - 1) >= SQUARES:
        raise Unknown("the loss is no mean squared error")
    (loss,) = observation.losses[observation.loss_steps == seen.step][:1]
    return math.sqrt(float(loss))


def _size(seen: ModelPass) -> float:
    """The largest output. Raises ``Unknown``."""
    size = max(abs(seen.output_low), abs(seen.output_high))
    if not (size > 0 and math.isfinite(size)):
        raise Unknown("the outputs were not read, or are all 0")
    return size
