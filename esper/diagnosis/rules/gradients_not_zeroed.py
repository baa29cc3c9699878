from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown


class GradientsNotZeroed(Rule):
    """Each backward pass adds to the gradient of the last one, so old batches are applied again."""

    slug = "gradients_not_zeroed"
    title = "Gradients are not zeroed"
    symptom = "The backward pass after an update starts from the gradient of the update before."
    thresholds = (
        Threshold("updates that start from an old gradient", 0, "updates", "TrainCheck (OSDI'25)"),
    )
    severity = Severity.SERIOUS
    false_alarm = "A method that keeps a decayed gradient on purpose as its own momentum."
    advice = "Call optimizer.zero_grad() once for each optimizer.step(), before backward()."
    every_step = True

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        carried = observation.zeroing.carried
        if not carried:
            raise Unknown("no second backward pass was observed")
        if not all(carried):
            return None
        return Evidence(
            observed="zero_grad() is missing: the gradient grew by the last gradient in each of "
            f"{len(carried)} update{'s' if len(carried) > 1 else ''}",
            limit="each update starts from a gradient of zero",
            signal="grad",
            value=float(len(carried)),
            since_step=1,
        )
