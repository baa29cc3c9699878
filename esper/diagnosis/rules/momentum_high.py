from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation

HIGH = 0.995


class MomentumHigh(Rule):
    """The momentum remembers hundreds of updates, so the weights overshoot and swing."""

    slug = "momentum_high"
    title = "Too much momentum"
    symptom = "The momentum of SGD is so high that an update is a mean over hundreds of gradients."
    thresholds = (
        Threshold("momentum", HIGH, "share", "0.9 is usual, 0.99 the highest: Sutskever 2013"),
    )
    severity = Severity.CAUTION
    false_alarm = "A very long run in which the momentum is raised step by step."
    advice = "Use a momentum of 0.9, with the same learning rate or a lower one."
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        reading = observation.last_gradients
        momentum = reading.settings.momentum
        if momentum < HIGH:
            return None
        lasts = f"{1 / (1 - momentum):,.0f} updates" if momentum < 1 else "all updates"
        return Evidence(
            observed=f"the momentum is {momentum:g}, so a gradient acts on in {lasts}",
            limit=f"below {HIGH:g}; 0.9 is usual",
            signal="momentum",
            value=momentum,
            since_step=reading.step,
        )
