from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

HIGH = 0.9


class DropoutHigh(Rule):
    """Dropout sets nearly all values to zero, so that too little is left to learn from."""

    slug = "dropout_high"
    title = "Too much dropout"
    symptom = "A dropout that is on sets nine of ten values to zero, or more."
    thresholds = (
        Threshold("probability", HIGH, "share", "0.5 and less is usual: Srivastava 2014"),
    )
    severity = Severity.CAUTION
    false_alarm = "A very wide layer in which few units are enough, as in some graph networks."
    advice = "Lower the probability: p is the share that is set to zero, not the share that stays."
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if not observation.dropouts:
            raise Unknown("no dropout is on")
        layer, highest = max(observation.dropouts, key=lambda dropout: dropout[1])
        if highest < HIGH:
            return None
        return Evidence(
            observed=f"{layer} sets {highest:.0%} of its values to zero",
            limit=f"less than {HIGH:.0%}; 50% and less is usual",
            signal="dropout",
            value=highest,
            began_at=layer,
        )
