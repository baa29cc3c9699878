from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.facts import LossKind, ModelPass
from esper.diagnosis.observation import Observation, Unknown

NEAR = 1e-3
SLACK = 0.01
# function that ends the model -> (smallest output, largest output)
RANGES = {
    "Softmax": (0.0, 1.0),
    "Sigmoid": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Relu": (0.0, math.inf),
}


class WrongOutputActivation(Rule):
    """The function at the end of the model does not fit the loss that is computed from it."""

    slug = "wrong_output_activation"
    title = "Wrong output activation"
    symptom = (
        "The outputs were squashed before a loss that does it again, or cannot reach the targets."
    )
    thresholds = (
        Threshold(
            "sum of a row of outputs, for cross-entropy", 1, "exactly", "DeepDiagnosis (ICSE'22)"
        ),
        Threshold(
            "targets outside the range of the outputs", SLACK, "share of the targets' range",
            "chosen: rounding and a little noise are no fault",
        ),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = "A distillation that compares probabilities on purpose."
    advice = "Remove the activation at the end of the model."
    remedies = (RemedySlug.TELL,)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        seen = observation.first_pass  # later, saturated outputs hide which loss it is
        if not seen.output_shape:
            raise Unknown("the model's output was not read")
        end = next((name for name in RANGES if seen.output_end.startswith(name)), "")
        constant = seen.classes == 1 and seen.output_low == seen.output_high == 1.0
        if constant and end == "Softmax":
            return _evidence("a softmax over one output is 1 for every input", "Use a sigmoid.")
        if seen.loss_kind is LossKind.UNKNOWN and not observation.is_squared:
            raise Unknown("the loss is not one that its gradient shows")
        return _twice(seen, end) or _out_of_range(seen, end)


def _twice(seen: ModelPass, end: str) -> Evidence | None:
    """The loss squashes its input, which is squashed already."""
    is_distribution = abs(seen.row_sum - 1.0) < NEAR and seen.output_low >= 0
    if seen.loss_kind is LossKind.CROSS_ENTROPY and seen.classes > 1:
        if end == "Softmax" or is_distribution:
            return _evidence(
                "the model ends with a softmax, and cross-entropy applies another one",
                "Remove the softmax: cross-entropy takes the raw outputs (logits).",
            )
        if end:
            return _evidence(
                f"the model ends with {end.lower()}, and cross-entropy applies a softmax to it",
                f"Remove the {end.lower()} at the end: cross-entropy takes raw outputs (logits).",
            )
    if seen.loss_kind is LossKind.TWO_SOFTMAXES:
        return _evidence(
            "a softmax is applied to the model's output, and cross-entropy applies another one",
            "Give cross-entropy the raw outputs (logits): remove the softmax before it.",
        )
    if seen.loss_kind is LossKind.BINARY_LOGITS and end:
        return _evidence(
            f"the model ends with {end.lower()}, and the loss applies a sigmoid to it",
            f"Remove the {end.lower()}, or use binary_cross_entropy after a sigmoid.",
        )
    return None


def _out_of_range(seen: ModelPass, end: str) -> Evidence | None:
    if seen.loss_kind not in (LossKind.SQUARED, LossKind.UNKNOWN) or not end:
        return None
    low, high = RANGES[end]
    near = SLACK * (seen.target_high - seen.target_low)
    if not (seen.target_low < low - near or seen.target_high > high + near):
        return None
    stays = f"is never below {low:g}" if math.isinf(high) else f"stays within {low:g} and {high:g}"
    return _evidence(
        f"the model ends with {end.lower()}, which {stays}; the targets are from "
        f"{seen.target_low:.4g} to {seen.target_high:.4g}",
        f"Remove the {end.lower()} at the end of the model, or scale the targets.",
    )


def _evidence(observed: str, advice: str) -> Evidence:
    return Evidence(
        observed=observed,
        limit="an output that fits the loss",
        signal="output",
        since_step=1,
        advice=advice,
    )
