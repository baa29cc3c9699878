from __future__ import annotations

import math
from dataclasses import replace

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold, of_size
from esper.diagnosis.facts import LossKind, ModelPass
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.updates import STEADY

ROWS = 8
EXACT = 0.01
TOO_FAR = 3.0
RISEN = 0.1
FIRST_STEPS = 10
BATCHES = 4
_DIVIDE = (
    "Divide the loss of each batch by the number of batches of an update, or divide the learning "
    "rate by it."
)
OF_ROWS = (LossKind.CROSS_ENTROPY, LossKind.LIKELIHOOD)
OF_ELEMENTS = (LossKind.BINARY, LossKind.BINARY_LOGITS)


class LossNotReduced(Rule):
    """The loss is a sum over the batch, so its gradient grows with the size of the batch."""

    slug = "loss_not_reduced"
    title = "The loss is summed, not averaged"
    symptom = "Each row of the batch has the weight 1 in the loss, instead of one part of it."
    thresholds = (
        Threshold("weight of a row, times the rows", 1, "ratio", "a mean over the batch"),
        Threshold(
            "update of a gradient's size / a sound one", TOO_FAR, "ratio",
            "chosen: above it, and where the loss rises after it, it is no note",
        ),
        Threshold("rise of the loss after the first update", RISEN, "share", "chosen"),
        Threshold(
            "backward passes of each update, each of a mean", BATCHES, "passes",
            "chosen: two or three may be parts of one loss",
        ),
    )  # fmt: skip
    severity = Severity.INFO
    false_alarm = "A sum on purpose, with a learning rate that was chosen for it."
    advice = 'Use reduction="mean", or divide the learning rate by the size of the batch.'
    remedies = (RemedySlug.SET_LR, RemedySlug.TELL)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        seen = observation.first_pass
        if found := self._squares(observation, seen) or _accumulated(observation, seen):
            return found
        if seen.loss_kind not in (*OF_ROWS, *OF_ELEMENTS):
            raise Unknown("the loss is not one whose weights its gradient shows")
        axes = seen.output_shape if seen.loss_kind in OF_ELEMENTS else seen.output_shape[:-1]
        rows = math.prod(axes)
        if rows < ROWS or abs(seen.loss_scale / rows - 1) > EXACT:
            return None
        return _evidence(f"{rows} rows", seen.loss_scale, observation)

    def _squares(self, observation: Observation, seen: ModelPass) -> Evidence | None:
        try:
            weight = observation.squares_in_loss(seen)
        except Unknown:
            return None
        numbers = math.prod(seen.output_shape)
        if numbers < ROWS or not abs(weight / numbers - 1) < EXACT:
            return None
        return _evidence(f"{numbers} squares", weight, observation)


def _accumulated(observation: Observation, seen: ModelPass) -> Evidence | None:
    """The gradients of several batches are added, and none of their means was divided."""
    passes = set(observation.zeroing.backwards)
    if len(passes) != 1 or not observation.follows_gradient:  # others divide by the size
        return None
    count = passes.pop()
    if count < BATCHES or not abs(_weight(observation, seen) - 1) < EXACT:
        return None
    found = _evidence(f"the {count} batches of an update", float(count), observation)
    return replace(found, advice=_DIVIDE)


def _weight(observation: Observation, seen: ModelPass) -> float:
    """Of a row in the loss of one batch, times the rows: 1 for a mean; NaN unknown."""
    if seen.loss_kind is not LossKind.UNKNOWN:
        return seen.loss_scale
    return observation.squares_in_loss(seen)


def _raised_the_loss(observation: Observation) -> bool:
    """False also where nobody can know."""
    first = observation.gradients[0].step
    if first > FIRST_STEPS:
        return False
    try:
        return not observation.loss_change_after(first) <= RISEN
    except Unknown:
        return False


def _evidence(parts: str, value: float, observation: Observation) -> Evidence:
    change = observation.gradients[0].change if observation.gradients else math.nan
    too_far = observation.follows_gradient and change > TOO_FAR * STEADY
    too_far = too_far and _raised_the_loss(observation)
    return Evidence(
        observed=f"the loss is a sum over {parts}"
        + (f", and its first update moves the weights by {of_size(change)}" * too_far),
        limit="a mean over the batch",
        signal="loss",
        value=value,
        since_step=1,
        severity=Severity.SERIOUS if too_far else None,
    )
