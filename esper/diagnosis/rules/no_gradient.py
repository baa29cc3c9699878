from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

READINGS = 3


class NoGradient(Rule):
    """The optimizer steps, and since the start no parameter has had a gradient above zero."""

    slug = "no_gradient"
    title = "No gradient at all"
    symptom = "At each step of the optimizer all gradients are zero or missing, since the start."
    thresholds = (
        Threshold("readings without a gradient", READINGS, "in a row", "chosen"),
        Threshold("loss", 0.0, "exactly", "a loss of zero has no gradient, which is no fault"),
    )
    severity = Severity.SERIOUS
    false_alarm = "A loss with a margin that all examples of the first batches keep."
    advice = (
        "Call zero_grad() before backward() and not after it; check that backward() is called, and "
        "that nothing detaches the loss from the model. In float16 small gradients become zero: "
        "scale the loss by a GradScaler."
    )
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        reading = observation.last_gradients
        if math.isnan(observation.loss):
            raise Unknown("the loss is NaN, which another rule explains")
        if not reading.rows:
            raise Unknown("the optimizer has no trainable parameter of the model")
        if memory.notes.get("found") or any(row.norm > 0 for row in reading.rows):
            memory.notes["found"] = True
            return None
        readings: set[int] = memory.notes.setdefault("readings", set())
        readings.add(reading.step)
        if len(readings) < READINGS or observation.loss == 0:
            return None
        missing = sum(math.isnan(row.norm) for row in reading.rows)
        how = "have no gradient" if missing == len(reading.rows) else "have a gradient of zero"
        return Evidence(
            observed=f"all {len(reading.rows)} trainable tensors {how} when the optimizer steps",
            limit="a gradient above zero",
            signal="grad",
            value=0.0,
            since_step=min(readings),
        )
