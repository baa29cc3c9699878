from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation


class TiedByMistake(Rule):
    """One layer object is in a container several times, so there is only one layer."""

    slug = "tied_by_mistake"
    title = "Weights are tied by mistake"
    symptom = "Several places of a container hold the same layer with the same weights."
    thresholds = (Threshold("places with the same layer", 1, "places", "by definition"),)
    severity = Severity.CAUTION
    false_alarm = "Layers that share their weights on purpose, as in ALBERT."
    advice = "Make a new layer for each place: [Layer() for _ in range(n)], not [Layer()] * n."
    remedies = (RemedySlug.TELL,)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        pairs = observation.duplicates
        if not pairs:
            return None
        return Evidence(
            observed=f"{pairs[0][1]} is the same object as {pairs[0][0]}; {len(pairs)} such places",
            limit="one layer for each place",
            signal="modules",
            value=float(len(pairs)),
            began_at=pairs[0][0],
            since_step=0,
        )
