from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown


class SoftmaxOverBatch(Rule):
    """The softmax at the end of the model is over the rows of the batch, not over the classes."""

    slug = "softmax_over_batch"
    title = "Softmax over the batch"
    symptom = "The model ends with a softmax over the first axis, so each answer depends on others."
    thresholds = (
        Threshold("axis of the softmax", 0, "of an output of two axes", "by definition"),
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
        if seen.softmax_axis != 0 or len(seen.output_shape) != 2 or min(seen.output_shape) < 2:
            return None
        rows, columns = seen.output_shape
        return Evidence(
            observed=f"the softmax of an output of {rows} x {columns} is over its {rows} rows",
            limit=f"a softmax over the {columns} columns",
            signal="output",
            value=0.0,
            since_step=observation.first_pass.step,
        )
