from __future__ import annotations

import math

import numpy as np

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.facts import Gradients
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.updates import is_decay_alone

READINGS = 3
LOW, LOW_OF_ELEMENTS = 1e-5, 1e-4
EQUAL, DIFFER, ELEMENTS = 1e-3, 10.0, 8


class ClippedToNothing(Rule):
    """The gradients are clipped to a norm at which the updates change next to nothing."""

    slug = "clipped_to_nothing"
    title = "Gradients clipped to almost nothing"
    symptom = (
        "The norm of all gradients is the same in each step though the batches differ, as clipping "
        "leaves it, and the updates are far too small."
    )
    thresholds = (
        Threshold(
            "largest / smallest norm of all gradients - 1", EQUAL, "share",
            "chosen: those of two batches differ by percents, clipping differs by 1e-6 / norm",
        ),
        Threshold("readings with it", READINGS, "in a row", "chosen"),
        Threshold(
            "difference of the losses / that of the norms", DIFFER, "ratio",
            "chosen: where the same batch comes again, neither differs",
        ),
        Threshold("median of update / weight", LOW, "ratio", "as for update_ratio_low"),
        Threshold(
            "the same, where each element is clipped", LOW_OF_ELEMENTS, "ratio",
            "as for update_ratio_low: such updates do not grow once the gradient does",
        ),
        Threshold(
            "elements of a tensor that shows it", ELEMENTS, "and more",
            "chosen: the gradient of one output's bias is constant for some losses",
        ),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "Gradients that a script makes equally long on purpose, at a tiny rate."
    advice = "Raise the limit of the clipping, such as max_grad_norm; 1 is usual."
    remedies = (RemedySlug.MATCH_UPDATES, RemedySlug.SET_LR, RemedySlug.TELL)

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if not observation.follows_gradient:
            raise Unknown("the optimizer divides the gradient by its size")
        newest = list(observation.gradients)[-READINGS:]
        if len(newest) < READINGS:
            raise Unknown("too few gradients were read")
        norms = [_norm(reading) for reading in newest]
        largest = [_largest(reading, observation) for reading in newest]
        by_element = _spread(largest) <= EQUAL < _spread(norms)
        if by_element:
            norms = largest
        low = LOW_OF_ELEMENTS if by_element else LOW
        if not all(0 < norm < math.inf for norm in norms):
            raise Unknown("the norms of the gradients are not known")
        change = max(reading.change for reading in newest)
        if not change < low or _spread(norms) > EQUAL or (by_element and observation.came_trained):
            return None
        losses = [_loss(observation, reading.step) for reading in newest]
        if not all(map(math.isfinite, losses)):
            raise Unknown("a training loss is not finite")
        if not _spread(losses) > DIFFER * max(_spread(norms), EQUAL / DIFFER):
            return None
        if by_element:
            observed = (
                f"the gradients are at most {norms[-1]:.3g} in each step, and an update moves the "
                f"weights by {change:.1e} of their size"
            )
        else:
            observed = (
                f"the norm of all gradients is {norms[-1]:.3g} in each step, and an update moves "
                f"the weights by {change:.1e} of their size"
            )
        return Evidence(
            observed=observed,
            limit=f"updates of at least {low:g}; about 0.001 is usual",
            signal="grad_norm",
            value=norms[-1],
            since_step=newest[0].step,
            only_tell=is_decay_alone(change, newest[-1].settings),
        )


def _norm(reading: Gradients) -> float:
    """L2, of all tensors together."""
    return math.sqrt(sum(row.norm**2 for row in reading.rows if row.norm >= 0))


def _largest(reading: Gradients, observation: Observation) -> float:
    """Largest root mean square of a tensor's gradient; 0 where no size is known.

    Where each element is clipped, all elements of some tensors are as large as that allows. Those
    of the last bias are so by the loss behind an absolute error of one or few outputs.
    """
    sizes = {tensor.name: tensor.elements for tensor in observation.tensors}
    known = [row for row in reading.rows if row.norm >= 0 and sizes.get(row.name, 0) >= ELEMENTS]
    return max((row.norm / math.sqrt(sizes[row.name]) for row in known), default=0.0)


def _loss(observation: Observation, step: int) -> float:
    """Of one step. Raises ``Unknown``."""
    found = np.flatnonzero(observation.loss_steps == step)
    if not len(found):
        raise Unknown(f"no training loss of step {step} is kept")
    return float(observation.losses[found[0]])


def _spread(values: list[float]) -> float:
    """Largest / smallest - 1."""
    return max(values) / min(values) - 1.0 if min(values) > 0 else math.inf
