from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

READINGS = 8  # the newest, in which a router has chosen each expert that is in use


class Unreached(Rule):
    """The first layers get no gradient at all, while the later ones learn."""

    slug = "unreached"
    title = "No gradient reaches the first layers"
    symptom = "From the input up to some layer no tensor has a gradient; behind it all have one."
    thresholds = (Threshold("readings without a gradient", 2, "in a row", "chosen"),)
    severity = Severity.SERIOUS
    false_alarm = "A feature extractor that is kept as it is by detach() on purpose."
    advice = (
        "Look for detach(), no_grad(), .data or a conversion to numpy between this layer and the "
        "loss, and check that the layer is called."
    )
    opens_after = 2
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        reading = observation.last_gradients
        alive: set[str] = set()
        without: dict[str, int] = {}
        for row in reading.rows:
            layer = row.name.rpartition(".")[0]
            if math.isnan(row.norm):
                without[layer] = without.get(layer, 0) + 1
            elif row.norm > 0:
                alive.add(layer)
        if not alive:
            raise Unknown("no tensor has a gradient")
        # A layer without a gradient behind a living one is a branch that this loss does not use.
        # One that had a gradient not long ago may be an expert that the router did not choose.
        reached = self._reached(memory, reading.step, alive)
        first = []
        for name in observation.layers:
            if name in alive:
                break
            if name in without and name not in reached:
                first.append(name)
        if not first:
            return None
        return Evidence(
            observed=f"no gradient reaches the first {len(first)} trainable layers, up to "
            f"{first[-1]}; {len(alive)} layers have one",
            limit="a gradient in every trainable layer",
            signal="grad",
            value=float(len(first)),
            began_at=first[-1],
        )

    def _reached(self, memory: Memory, step: int, alive: set[str]) -> set[str]:
        """The layers that had a gradient in one of the newest readings."""
        readings: dict[int, set[str]] = memory.notes.setdefault("reached", {})
        readings[step] = alive
        for old in list(readings)[:-READINGS]:
            del readings[old]
        return set().union(*readings.values())
