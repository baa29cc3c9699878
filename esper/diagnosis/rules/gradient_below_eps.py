from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.facts import Gradients
from esper.diagnosis.observation import Observation, Unknown

SHARE, OVER = 0.1, 0.5
FIRST_STEPS = 10
FAINT = 3e-4
MEAN = 0.1


class GradientBelowEps(Rule):
    """The gradient is so small that the eps of the optimizer sets the size of the updates."""

    slug = "gradient_below_eps"
    title = "Gradients are smaller than eps"
    symptom = (
        "The gradients of all tensors are much smaller than the eps that an optimizer such as Adam "
        "adds to their size, so that its updates are a small part of the learning rate."
    )
    thresholds = (
        Threshold(
            "gradient, root mean square, of every tensor", SHARE, "of eps",
            "by definition: an update is then a tenth of the learning rate or less",
        ),
        Threshold(
            "update", FAINT, "share of the weights", "a tenth of a sound one"
        ),
        Threshold("only until step", FIRST_STEPS, "steps", "later a gradient may be 0"),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "A model that came trained, with nothing left to learn."
    advice = (
        "Look for a loss that is divided twice, such as by the batch and by the steps of an "
        "accumulation; otherwise multiply the loss, or lower eps."
    )
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        reading = observation.last_gradients
        eps = reading.settings.eps
        if not memory.is_open and (reading.step > FIRST_STEPS or _came_trained(observation)):
            return None
        if not eps > 0:
            raise Unknown("the optimizer has no eps that is known")
        largest = _largest(observation, reading)
        if not 0 < largest < eps * (OVER if memory.is_open else SHARE):
            return None
        if not memory.is_open and not reading.change < FAINT:
            return None
        return Evidence(
            observed=f"the gradients of all tensors are {largest:.1e} and less, and eps is {eps:g}",
            limit="gradients well above eps",
            signal="eps",
            value=largest / eps,
            since_step=reading.step,
        )


def _came_trained(observation: Observation) -> bool:
    """Its first losses are small, and not because they were divided."""
    return observation.came_trained and observation.first_pass.loss_scale >= MEAN


def _largest(observation: Observation, reading: Gradients) -> float:
    """Root mean square of the elements of the tensor where it is largest. Raises ``Unknown``."""
    sizes = {tensor.name: tensor.elements for tensor in observation.tensors}
    known = [row for row in reading.rows if row.norm >= 0]
    if not known or any(row.name not in sizes for row in known):
        raise Unknown("the gradients, or the sizes of their tensors, are not known")
    return max(row.norm / math.sqrt(sizes[row.name]) for row in known)
