from __future__ import annotations

import math
from itertools import pairwise
from statistics import median

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

EVALUATIONS = 5
RISE = 0.25
MILD = 0.1
GAP = 0.1
STILL = 0.05
SWINGS = 2.0
GIVEN_BACK = 0.1


class OverFitting(Rule):
    """The held-out loss rises from its best value while the training loss goes on falling."""

    slug = "over_fitting"
    title = "The model over-fits"
    symptom = (
        "The held-out loss is a quarter above its best and a tenth above the training loss, and "
        "the training loss is lower now."
    )
    thresholds = (
        Threshold("held-out loss above its best", RISE, "share", "chosen on 0 to 9"),
        Threshold("held-out above training loss", GAP, "share", "SageMaker Debugger's ratio"),
        Threshold("above its best, as info", MILD, "share", "chosen"),
        Threshold("evaluations", EVALUATIONS, "evaluations", "chosen; the last three count"),
        Threshold("the same, by its usual swing", SWINGS, "swings", "between two evaluations"),
        Threshold("to resolve", STILL, "share", "chosen"),
        Threshold(
            "rise / fall of the held-out loss before it", GIVEN_BACK, "share",
            "chosen: below it, it is info; nearly all that was learned is kept",
        ),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "A held-out loss that grows with confidence while the accuracy still rises."
    advice = "Keep the weights of the best evaluation; use weight decay, more data, or stop here."
    remedies = (RemedySlug.WEIGHT_DECAY, RemedySlug.RESTORE_BEST, RemedySlug.STOP_EARLY)
    closes_after = 1
    explained_by = frozenset({"memorised_noise", "non_finite", "loss_spike"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        held_out = [(s, loss) for s, loss in observation.held_out if math.isfinite(loss)]
        if len(held_out) < EVALUATIONS:
            raise Unknown("fewer than five held-out losses")
        # One evaluation may be low by chance, so the level is that of three in a row.
        levels = [
            (held_out[i][0], median(loss for _, loss in held_out[i - 1 : i + 2]))
            for i in range(1, len(held_out) - 1)
        ]
        best_step, best = min(levels, key=lambda entry: entry[1])
        now = levels[-1][1]
        then = observation.training_loss_at(best_step)
        latest = observation.training_loss_at(observation.step)
        limit = STILL if memory.is_open else MILD
        swings = median(abs(b - a) for (_, a), (_, b) in pairwise(held_out))
        if now <= best + max(limit * abs(best), SWINGS * swings) or latest >= then:
            return None
        learned = max(held_out[0][1], observation.first_training_loss) - best
        rises = now > best + max(RISE * abs(best), GIVEN_BACK * learned)
        return Evidence(
            observed=f"the held-out loss is {now:.4g}; its best was {best:.4g} at step "
            f"{best_step:,}; the training loss fell from {then:.4g} to {latest:.4g}",
            limit=f"at most {MILD:.0%} above the best",
            signal="eval_loss",
            value=now / best - 1 if best else math.nan,
            since_step=best_step,
            severity=None if rises and now > latest + GAP * abs(latest) else Severity.INFO,
        )
