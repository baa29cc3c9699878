from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

ALIKE = 1e-5
DIFFERENT = 0.01
BEGIN, PASSES = 30, 2


class ConstantOutput(Rule):
    """The model gives the same answer to every input."""

    slug = "constant_output"
    title = "The same answer to every input"
    symptom = "The inputs of a batch differ, and the outputs of all its rows are the same."
    thresholds = (
        Threshold("spread of the outputs", ALIKE, "share of their size", "rounding of float32"),
        Threshold("spread of the inputs", DIFFERENT, "share of their size", "chosen"),
        Threshold("observed forward passes", PASSES, "in a row", "chosen"),
        Threshold("from step", BEGIN, "steps", "a last layer of zeros has begun to learn"),
    )
    severity = Severity.SERIOUS
    false_alarm = "Targets that are the same for all inputs."
    advice = (
        "Look for a mean or a softmax over the batch instead of the features, and for a loss that "
        "is lowest where all outputs are equal."
    )
    opens_after = 1
    closes_after = 1
    explained_by = frozenset(
        {
            "non_finite", "nothing_moves", "bad_initialisation", "dying_relu", "abnormal_data",
            "vanishing_gradient", "weight_decay_high", "repeated_initialisation", "saturation",
            "wrong_loss", "wrong_output_activation", "rate_jump", "update_ratio_high",
        }
    )  # fmt: skip

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        recent = [seen for seen in observation.passes[-PASSES:] if seen.step >= BEGIN]
        if len(recent) < PASSES:
            raise Unknown("too few forward passes were observed")
        for seen in recent:
            if math.isnan(seen.output_spread) or not seen.layers:
                raise Unknown("the rows of the output were not compared")
            entering = seen.layers[0].input_spread
            if seen.output_spread >= ALIKE or entering < DIFFERENT:
                return None
        return Evidence(
            observed=f"the outputs of a batch differ by {recent[-1].output_spread:.1e} of their "
            "size, and the inputs differ",
            limit=f"at least {ALIKE:g}",
            signal="output",
            value=recent[-1].output_spread,
            since_step=recent[0].step,
        )
