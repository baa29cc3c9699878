from __future__ import annotations

from typing import Any

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.facts import Gradients
from esper.diagnosis.observation import Observation, Unknown

READINGS, STEP = 3, 30


class GroupWithoutRate(Rule):
    """One group of the optimizer has a learning rate of 0, and its weights were never trained."""

    slug = "group_without_rate"
    title = "A parameter group has a rate of 0"
    symptom = (
        "Weights with the random values of new layers get a gradient and never move: the learning "
        "rate of their group is 0, that of another is not."
    )
    thresholds = (
        Threshold("readings at a rate of 0", READINGS, "in a row, since the first", "chosen"),
        Threshold("from step", STEP, "steps", "chosen: a warm-up begins at 0"),
        Threshold("change of these weights", 0, "exactly", "by definition"),
    )
    severity = Severity.CAUTION
    false_alarm = "Random features that are meant, or layers that a schedule starts much later."
    advice = (
        "Give the group a learning rate, or load its trained weights. A scheduler multiplies the "
        "rate that the group began with, and 0 stays 0."
    )
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        reading = observation.last_gradients
        if not any(row.rate > 0 for row in reading.rows):
            raise Unknown("no group is known to have a learning rate above zero")
        notes = memory.notes
        if notes.get("latest") != reading.step:
            _take(reading, notes)
        still = notes["still"]
        if notes["readings"] < READINGS or observation.step < STEP or not still:
            return None
        facts = [tensor for tensor in observation.tensors if tensor.name in still]
        if len(facts) < len(still) or not all(tensor.untrained for tensor in facts):
            return None  # trained weights may be left as they are on purpose
        return Evidence(
            observed=f"{facts[0].name} has its first random values still, and the learning rate of "
            f"its group is 0; the same is true of {len(still)} matrices in all",
            limit="a learning rate above zero",
            signal="learning_rate_of_group",
            value=0.0,
            began_at=facts[0].layer,
            since_step=notes["first"],
        )


def _take(reading: Gradients, notes: dict[str, Any]) -> None:
    """Notes which matrices with a gradient have never moved, all at a rate of 0."""
    moved: set[str] = notes.setdefault("moved", set())
    moved.update(row.name for row in reading.rows if row.rate != 0 or row.change != 0)
    notes.setdefault("first", reading.step)
    notes["latest"] = reading.step
    notes["readings"] = notes.get("readings", 0) + 1
    notes["still"] = {row.name for row in reading.rows if row.norm > 0 and row.name not in moved}
