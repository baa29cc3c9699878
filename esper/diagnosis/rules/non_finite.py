from __future__ import annotations

import math

from esper.contracts import Severity, ViolationRule
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation

_NO_TARGET = (
    "No target of the batch counts, and a mean over none is NaN: look at the labels that the loss "
    "gets. cross_entropy, and so transformers, leaves out those that are -100."
)


class NonFinite(Rule):
    """A NaN or an infinity in the loss spreads to every weight with the next update."""

    slug = "non_finite"
    title = "NaN or infinite values"
    symptom = "The loss is NaN or infinite."
    thresholds = (Threshold("finite losses", 1, "share", "IEEE 754; a NaN stays a NaN"),)
    severity = Severity.CRITICAL
    false_alarm = (
        "A script that reports NaN for a skipped batch: its weights stay finite, and the next loss "
        "closes the finding."
    )
    advice = "Return to the last checkpoint with finite weights, with a lower learning rate."
    remedies = (RemedySlug.SKIP_UPDATE, RemedySlug.REWIND, RemedySlug.SET_LR)
    violation = ViolationRule.NON_FINITE
    every_step = True
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        loss = observation.loss
        if math.isfinite(loss):
            memory.notes.pop("since", None)  # the next one may pass as this one did
            return None
        since = int(memory.notes.setdefault("since", observation.step))
        broken = observation.broken
        where, began, advice = "", "", ""
        if broken.weights:
            began = broken.weights[0]
            where = f"; the weights of {len(broken.weights)} layers are not finite"
        elif broken.gradients:
            began = broken.gradients[0]
            where = f"; the gradients of {len(broken.gradients)} layers are not finite"
        elif broken.nothing_counts:
            where = "; the weights are finite, and all gradients are zero"
            advice = _NO_TARGET
        else:
            where = "; weights and gradients are finite"
            advice = "The weights are intact: skip this batch, and look at its data and the loss."
        if not observation.last_input_finite:
            where += "; the model's input was not finite"
            advice = "The data has values that are NaN or infinite: remove or replace them."
        return Evidence(
            observed=f"the loss became {loss}{where}",
            limit="finite",
            signal="loss",
            value=loss,
            began_at=began,
            since_step=since,
            advice=advice,
            # A script or a GradScaler may leave the update out, and the run goes on as before.
            may_pass=not broken.weights,
            only_tell=advice == _NO_TARGET,  # neither the weights nor the rate are at fault
        )
