from __future__ import annotations

import math

import numpy as np

from esper.contracts import Severity, Signal
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

GROWTH = 1.5
HIGH = 0.2
STILL = 0.1


class UpdateRatioHigh(Rule):
    """Each update changes a large part of the weights, so the run forgets what it has learned."""

    slug = "update_ratio_high"
    title = "Updates are too large"
    symptom = "In half of the layers, an update is more than 20 % of the weight."
    thresholds = (
        Threshold("median of update / weight", HIGH, "ratio", "1e-3 is usual; chosen on 0 to 9"),
        Threshold("weights after / before the first update", GROWTH, "ratio", "chosen on 0 to 9"),
        Threshold("to resolve", STILL, "ratio", "chosen"),
    )
    severity = Severity.SERIOUS
    false_alarm = "The first steps of an adapter that starts at zero."
    advice = "Lower the learning rate, by a factor of ten first."
    remedies = (RemedySlug.SET_LR, RemedySlug.REWIND)
    opens_after = 2
    explained_by = frozenset({"non_finite", "rate_jump"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if observation.step == 1:
            return self._first_update(observation)
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

    def _first_update(self, observation: Observation) -> Evidence | None:
        """No health frame covers the first update, which has no past to average over."""
        before = {t.name: t.std * math.sqrt(t.elements) for t in observation.tensors if t.is_matrix}
        growth = {
            row.name: row.weight_norm / before[row.name]
            for row in observation.last_gradients.rows
            if before.get(row.name, 0.0) > 0 and math.isfinite(row.weight_norm)
        }
        if not growth:
            raise Unknown("the weights before the first update are not known")
        median = float(np.median(list(growth.values())))
        if median < GROWTH:
            return None
        worst = max(growth, key=lambda name: growth[name])
        return Evidence(
            observed=f"the first update made the weights {median:.2g} times as large, those of "
            f"{worst} {growth[worst]:.2g} times",
            limit=f"at most {GROWTH:g} times",
            signal="weight_norm",
            value=median,
            began_at=worst.rpartition(".")[0],
            certain=True,
        )
