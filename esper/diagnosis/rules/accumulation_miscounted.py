from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown


class AccumulationMiscounted(Rule):
    """Steps and zero_grad() are counted differently, so some batches enter several updates."""

    slug = "accumulation_miscounted"
    title = "Accumulation is miscounted"
    symptom = "Some updates start from an old gradient, and others do not."
    thresholds = (
        Threshold(
            "updates that start from an old gradient",
            2,
            "updates",
            "chosen: one may be Esper's own",
        ),
    )
    severity = Severity.SERIOUS
    false_alarm = "A loop with another backward pass between two updates, whose gradient is kept."
    advice = (
        "Call optimizer.step() and optimizer.zero_grad() together, after the same number of "
        "backward passes."
    )
    opens_after = 2

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        carried = observation.zeroing.carried
        if len(carried) < 4:
            raise Unknown("fewer than four updates were observed")
        # One alone may be a backward pass outside the loop, such as that of a gradient penalty.
        if sum(carried) < 2 or all(carried):
            return None
        return Evidence(
            observed=f"{sum(carried)} of {len(carried)} updates started from the gradient of the "
            "update before, so their batches were applied twice",
            limit="each update starts from a gradient of zero",
            signal="grad",
            value=sum(carried) / len(carried),
            since_step=1,
        )
