from __future__ import annotations

import math

import numpy as np

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

SHARE = 0.5
STILL = 0.4
UNLEARNED = 0.95
UNLEARNED_EARLY = 0.9
BELOW_GUESSING = 0.8
LEVEL_LOSSES, FEWEST_LOSSES = 20, 10


class Saturation(Rule):
    """Sigmoids or tanhs are at the ends of their range, where they pass on no gradient."""

    slug = "saturation"
    title = "Activations are saturated"
    symptom = "Half of the activations behind a layer are within 1 % of the ends of their range."
    thresholds = (
        Threshold("saturated activations", SHARE, "share", "DeepDiagnosis (ICSE'22)"),
        Threshold("to resolve", STILL, "share", "chosen"),
        Threshold("loss / first loss", UNLEARNED, "ratio", "below it the run learns: info"),
        Threshold(
            f"the same of a run with fewer than {2 * LEVEL_LOSSES} losses", UNLEARNED_EARLY,
            "ratio", "chosen: the first ones are far apart",
        ),
        Threshold("mean loss / that of guessing", BELOW_GUESSING, "ratio", "chosen; the same"),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "Gates, or units of a narrow layer, that have learned to be fully on or off."
    advice = "Start with smaller weights and scaled inputs; if it came later, lower the rate."
    remedies = (
        RemedySlug.REPAIR_SCALE,
        RemedySlug.REWIND,
        RemedySlug.SET_LR,
        RemedySlug.TELL,
    )
    opens_after = 2
    closes_after = 2
    explained_by = frozenset({"non_finite"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        seen = observation.last_pass
        if memory.notes.get("pass") == seen.step:
            raise Unknown("no newer forward pass was observed")
        # What enters the first layer is data.
        known = [p for p in seen.layers[1:] if not math.isnan(p.input_extremes)]
        if not known:
            raise Unknown("no layer has an input between -1 and 1")
        memory.notes["pass"] = seen.step
        limit = STILL if memory.is_open else SHARE
        found = [p for p in known if p.input_extremes >= limit]
        if not found:
            return None
        names = [p.layer for p in seen.layers]
        before = names[max(0, names.index(found[0].layer) - 1)]
        return Evidence(
            observed=f"{found[0].input_extremes:.0%} of what enters {found[0].layer} is saturated; "
            f"the same is true of {len(found)} of {len(known)} layers in all",
            limit=f"less than {SHARE:.0%}",
            signal="activation",
            value=found[0].input_extremes,
            began_at=before,
            severity=Severity.INFO if _learns(observation) else None,
        )


def _learns(observation: Observation) -> bool:
    """In spite of it: what a narrow layer says with units that are on or off is no fault."""
    losses = observation.finite_losses()[1]
    count = min(LEVEL_LOSSES, len(losses) // 2)
    if count < FEWEST_LOSSES:
        return False
    if float(np.mean(losses[-2 * count :])) < BELOW_GUESSING * observation.last_pass.guessing_loss:
        return True  # also where the first losses are low, because it learned within a few steps
    share = UNLEARNED if count == LEVEL_LOSSES else UNLEARNED_EARLY
    return float(np.median(losses[-count:])) < share * observation.first_training_loss
