from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation

LONG = 0.98


class BetasSwapped(Rule):
    """Adam's direction remembers hundreds of gradients, and their size only a few."""

    slug = "betas_swapped"
    title = "Adam's betas are swapped"
    symptom = "The first beta of an optimizer such as Adam is larger than the second."
    thresholds = (
        Threshold("first beta, where the second is smaller", LONG, "share", "chosen: 0.9 is usual"),
    )
    severity = Severity.CAUTION
    false_alarm = "Betas that were searched for, with a first one that is this large."
    advice = "Give the smaller one first: betas=(0.9, 0.999)."
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        reading = observation.last_gradients
        first = reading.settings.first_beta
        if first < LONG:
            return None
        return Evidence(
            observed=f"the first beta is {first:g}, and the second is smaller: the direction of an "
            f"update is a mean over {1 / (1 - min(first, 0.9999)):,.0f} gradients",
            limit="a first beta below the second; 0.9 and 0.999 are usual",
            signal="betas",
            value=first,
            since_step=reading.step,
        )
