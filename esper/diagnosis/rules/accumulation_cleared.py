from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

BATCHES = 4
UPDATES = 2


class AccumulationCleared(Rule):
    """zero_grad() stands inside the accumulation, so that all batches but the last are lost."""

    slug = "accumulation_cleared"
    title = "Accumulated gradients are cleared"
    symptom = (
        "Each update has several backward passes, each of them begins at a gradient of zero, and "
        "the update uses the gradient of the last one alone."
    )
    thresholds = (
        Threshold(
            "backward passes of each update", BATCHES, "passes",
            "chosen: two or three may be losses of other models, as in a GAN",
        ),
        Threshold("such updates, all that were seen", UPDATES, "updates", "chosen"),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = "A loop that looks at the gradients of several batches, and trains with one."
    advice = "Call optimizer.zero_grad() after optimizer.step(), not before each backward()."

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        zeroing = observation.zeroing
        if len(zeroing.cleared) < UPDATES:
            raise Unknown("fewer than two updates were observed")
        passes = set(zeroing.backwards)
        if len(passes) != 1 or min(passes) < BATCHES or not all(zeroing.cleared):
            return None
        count = passes.pop()
        return Evidence(
            observed=f"each update has {count} backward passes, and uses the gradient of the last "
            f"one alone: zero_grad() has cleared the other {count - 1}",
            limit="the sum of all of them",
            signal="grad",
            value=float(count),
            since_step=1,
        )
