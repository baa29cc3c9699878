from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.facts import LossKind
from esper.diagnosis.observation import Observation, Unknown

ROWS = 8
CLASSES = 2
SHARE = 0.5
_OF_CLASSES = (LossKind.CROSS_ENTROPY, LossKind.BINARY, LossKind.BINARY_LOGITS)


class SortedData(Rule):
    """Each batch holds one class, and the next batches another one: the data is not shuffled."""

    slug = "sorted_data"
    title = "The data is sorted"
    symptom = "All rows of a batch have the same class, and those of another batch another class."
    thresholds = (
        Threshold("rows of such a batch", ROWS, "rows", "chosen: chance does not draw them"),
        Threshold("different classes in such batches", CLASSES, "classes", "by definition"),
        Threshold("such batches of those that were observed", SHARE, "share", "chosen"),
    )
    severity = Severity.SERIOUS
    false_alarm = "Batches that are made of one class each on purpose."
    advice = "Shuffle the data: DataLoader(..., shuffle=True)."
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        known = [
            seen
            for seen in observation.passes
            if seen.loss_kind in _OF_CLASSES
            and len(seen.output_shape) == 2
            and seen.output_shape[0] >= ROWS
            and not math.isnan(seen.target_low)
        ]
        if len(known) < CLASSES:
            raise Unknown("the classes of two batches are not known")
        alike = [seen for seen in known if seen.target_low == seen.target_high]
        classes = {seen.target_low for seen in alike}
        if len(classes) < CLASSES or len(alike) < SHARE * len(known):
            return None
        return Evidence(
            observed=f"{len(alike)} of {len(known)} observed batches hold one class each, "
            f"{len(classes)} different ones",
            limit="batches with several classes",
            signal="targets",
            value=len(alike) / len(known),
            since_step=alike[0].step,
        )
