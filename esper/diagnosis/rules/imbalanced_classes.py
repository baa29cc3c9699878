from __future__ import annotations

import math
from collections import Counter, defaultdict

from esper.contracts import Severity
from esper.diagnosis import samples
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.facts import ModelPass
from esper.diagnosis.observation import Observation, Unknown

MOST = 0.95
ROWS, WEIGHTED_ROWS = 128, 64
LATE, MISSED = 200, 5
_WEIGHTS = (
    "Look at the weights of the classes: a rare class needs the larger one, such as rows / "
    "(classes * rows of the class); pos_weight is rows of class 0 / rows of class 1."
)


class ImbalancedClasses(Rule):
    """Nearly all of what the loss sums up is one class: by its rows, or by its weight."""

    slug = "imbalanced_classes"
    title = "One class in nearly all rows"
    symptom = (
        "At least 95 % of the targets are one class, and no other one is ever answered; or the "
        "weights of the classes in the loss give so much of it to one that has fewer rows."
    )
    thresholds = (
        Threshold("share of the most frequent class", MOST, "share", "chosen"),
        Threshold("sampled rows", ROWS, "rows", "chosen: no chance among 80 %"),
        Threshold("the same, of known weights", WEIGHTED_ROWS, "rows", "chosen: weights are exact"),
        Threshold(
            f"rows of other classes from step {LATE} on, and no other answer", MISSED, "rows",
            "chosen: a model that finds every second one misses so many with 3 %; else it is info",
        ),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "A rare class that nobody needs; one that is learned much later."
    advice = (
        "Judge by the recall of the rare classes, not by accuracy. Weight them in the loss, draw "
        "them more often, or ignore padding with ignore_index."
    )

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if weighted := [seen for seen in observation.passes if seen.class_weights]:
            return _by_weights(weighted)
        known = [seen for seen in observation.passes if not math.isnan(seen.target_share)]
        rows = sum(map(_rows, known))
        if rows < ROWS:
            raise Unknown("too few targets of classes were seen")
        top = known[0].target_class
        share = sum(_rows(seen) * seen.target_share for seen in known) / rows
        if share < MOST or any(seen.target_class != top for seen in known):
            return None
        late = [seen for seen in known if seen.step >= LATE]
        missed = sum(_rows(seen) * (1 - seen.target_share) for seen in late)
        alone = missed > MISSED - 0.5 and all(seen.answered_share == 1.0 for seen in late)
        return Evidence(
            observed=f"{share:.1%} of the sampled targets are class {top}"
            + (", and the model answers it to every input" if alone else ""),
            limit=f"less than {MOST:.0%} of one class, or other answers",
            signal="targets",
            value=share,
            since_step=known[0].step,
            severity=None if alone else Severity.INFO,
        )


def _rows(seen: ModelPass) -> int:
    """Those that were sampled."""
    return min(samples.ROWS, math.prod(seen.output_shape[:-1]))


def _by_weights(passes: list[ModelPass]) -> Evidence | None:
    """Weights that are meant make the classes more alike; these leave one of them alone."""
    rows: Counter[int] = Counter()
    sums: dict[int, float] = defaultdict(float)
    for seen in passes:
        whole = sum(entry.rows * entry.weight for entry in seen.class_weights)
        for number, count, weight in seen.class_weights:
            rows[number] += count
            sums[number] += count * weight / whole
    if rows.total() < WEIGHTED_ROWS:
        raise Unknown("too few targets of classes were seen")
    top = max(sums, key=lambda number: sums[number])
    share, of_rows = sums[top] / sum(sums.values()), rows[top] / rows.total()
    if share < MOST or of_rows >= MOST:
        return None
    return Evidence(
        observed=f"class {top} has {of_rows:.1%} of the sampled rows, and by the weights of the "
        f"classes {share:.1%} of the loss",
        limit=f"less than {MOST:.0%} of the loss for one class",
        signal="targets",
        value=share,
        since_step=passes[0].step,
        advice=_WEIGHTS,
    )
