from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.facts import LossKind
from esper.diagnosis.observation import Observation, Unknown


class SoftmaxOverBatch(Rule):
    """A softmax, of the model or in the loss, is over the rows of the batch, not over classes."""

    slug = "softmax_over_batch"
    title = "Softmax over the batch"
    symptom = "A softmax behind the model is over the first axis, so each answer depends on others."
    thresholds = (
        Threshold("axis of the softmax", 0, "of an output of two axes", "by definition"),
        Threshold("rows of the same target, of a loss", 2, "and more", "each is one in a contrast"),
        Threshold("columns of the output", 2, "and more", "one is a weight for each row, as meant"),
    )
    severity = Severity.SERIOUS
    false_alarm = "Weights of the rows of one bag, as in attention over instances."
    advice = "Use dim=-1, or leave the softmax out where the loss is cross_entropy."
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        seen = observation.last_pass
        if not seen.output_shape:
            raise Unknown("the model's output was not read")
        at_end = seen.softmax_axis == 0 and len(seen.output_shape) == 2
        in_loss = observation.first_pass.loss_kind is LossKind.OVER_ROWS
        if min(seen.output_shape) < 2 or not (at_end or in_loss):
            return None
        rows, columns = math.prod(seen.output_shape[:-1]), seen.output_shape[-1]
        return Evidence(
            observed=f"the softmax of an output of {rows} x {columns} is over its {rows} rows",
            limit=f"a softmax over the {columns} columns",
            signal="output",
            value=0.0,
            since_step=observation.first_pass.step,
        )
