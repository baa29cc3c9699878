from __future__ import annotations

import math

import numpy as np

from esper.contracts import Severity, Signal
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

FIRST = 0.3
FIRST_STEPS = 10
HIGH = 0.2
STILL = 0.1


class UpdateRatioHigh(Rule):
    """Each update changes a large part of the weights, so the run forgets what it has learned."""

    slug = "update_ratio_high"
    title = "Updates are too large"
    symptom = "In half of the layers, an update is more than 20 % of the weight."
    thresholds = (
        Threshold("median of update / weight", HIGH, "ratio", "1e-3 is usual; chosen on 0 to 9"),
        Threshold("the same in one of the first updates", FIRST, "ratio", "chosen on seeds 0 to 9"),
        Threshold("to resolve", STILL, "ratio", "chosen"),
    )
    severity = Severity.SERIOUS
    false_alarm = "The first steps of an adapter that starts at zero."
    advice = "Lower the learning rate, by a factor of ten first."
    remedies = (RemedySlug.SET_LR, RemedySlug.REWIND)
    opens_after = 2
    explained_by = frozenset({"non_finite", "rate_jump"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if observation.step <= FIRST_STEPS:
            return self._first_updates(observation, memory)
        frames = observation.signal_history(Signal.UPDATE_RATIO)
        if not frames:
            raise Unknown("no health frame has the update ratio")
        step, median = frames[-1]
        if memory.notes.get("frame") == step:
            raise Unknown("there is no newer frame")
        memory.notes["frame"] = step
        if median < (STILL if memory.is_open else HIGH):
            return None
        ratios = observation.signal(Signal.UPDATE_RATIO)
        worst = max(ratios, key=lambda name: np.nan_to_num(ratios[name]))
        return Evidence(
            observed=f"the median update is {median:.2g} of its weight at step {step}, "
            f"{ratios[worst]:.2g} in {worst}",
            limit=f"below {HIGH:g}; about 0.001 is usual",
            signal=Signal.UPDATE_RATIO,
            value=median,
            began_at=worst,
        )

    def _first_updates(self, observation: Observation, memory: Memory) -> Evidence | None:
        """No health frame covers the first update, which has no past to average over."""
        reading = observation.last_gradients
        if math.isnan(reading.change):
            raise Unknown("how far the update moved the weights was not measured")
        if reading.change < (STILL if memory.is_open else FIRST):
            return None
        known = [row for row in reading.rows if not math.isnan(row.change)]
        worst = max(known, key=lambda row: row.change).name
        return Evidence(
            observed=f"the update of step {reading.step} moved the weights by {reading.change:.2g} "
            "of their size in the median",
            limit=f"below {FIRST:g}; about 0.001 is usual",
            signal=Signal.UPDATE_RATIO,
            value=reading.change,
            began_at=worst.rpartition(".")[0],
            certain=True,
        )
