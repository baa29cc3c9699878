from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.gradient_probe import SMALLEST
from esper.diagnosis.observation import Observation, Unknown

MOVED = 0.02
WARM_UP = 10
ZERO_RATE, ZERO_UPDATES = 50, 20
_ZERO_RATE = (
    "Look at the schedule: what it multiplies the rate by is 0, as a whole-number division or a "
    "warm-up that counts epochs gives. In Lightning, interval decides what it counts."
)


class NothingMoves(Rule):
    """The loop runs and reports numbers, and no weight changes."""

    slug = "nothing_moves"
    title = "No weight changes"
    symptom = "The optimizer makes steps with a learning rate above zero, and no weight changes."
    thresholds = (
        Threshold("elements that changed", MOVED, "share", "chosen: the smallest may round up"),
        Threshold("largest gradient norm", SMALLEST, "L2", "rounding of float32"),
        Threshold(
            "with an optimizer that is not torch's, from step", WARM_UP, "steps",
            "RAdamScheduleFree begins with five updates at a rate of zero",
        ),
        Threshold("a rate of 0 since the start", ZERO_RATE, "steps", "chosen: warm-ups begin at 0"),
        Threshold(
            "the same, where the updates are counted", ZERO_UPDATES, "updates",
            "chosen: a warm-up has one of them, and one that counts epochs an epoch",
        ),
    )  # fmt: skip
    severity = Severity.CRITICAL
    false_alarm = "Gradients that are exactly zero because the loss is already zero."
    advice = (
        "Check that the optimizer was made from the parameters of this model, after .to() and "
        "after loading it, and that a step is not smaller than the rounding of the weights' dtype."
    )
    remedies = (RemedySlug.ADOPT, RemedySlug.TELL)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        reading = observation.last_gradients
        if _is_at_zero(observation):
            return Evidence(
                observed=f"the learning rate has been 0 since the start, for {observation.step:,} "
                "steps",
                limit="a learning rate above 0",
                signal="highest_rate",
                value=0.0,
                since_step=1,
                severity=Severity.CAUTION,
                advice=_ZERO_RATE,
                only_tell=True,  # no other rate is known
            )
        if math.isnan(reading.moved) or not reading.updates:
            raise Unknown("no two readings with an update between them")
        if not reading.rate > 0:
            raise Unknown("the learning rate is zero")
        if reading.moved > MOVED:
            memory.notes["moved"] = True
        if observation.warms_up and observation.step <= WARM_UP:
            raise Unknown("the optimizer may warm up by itself")
        # An optimizer that has converged stops too, such as L-BFGS.
        if memory.notes.get("moved"):
            return None
        return Evidence(
            observed=f"{reading.moved:.0%} of the weights changed in {reading.updates} updates "
            f"at a learning rate of {reading.rate:.3g}, although gradients are above zero",
            limit="weights that change",
            signal="weights",
            value=reading.moved,
            since_step=max(1, observation.step - reading.updates),
        )


def _is_at_zero(observation: Observation) -> bool:
    """The rate has been 0 since the start; steps that only add up gradients make no update."""
    if any(rate != 0 for _, rate in observation.rates):
        return False
    readings = observation.gradients
    counted = len(readings) == readings[-1].readings and all(r.rate == 0 for r in readings)
    updates = sum(reading.updates for reading in readings) if counted else 0
    return observation.step >= ZERO_RATE or updates >= ZERO_UPDATES
