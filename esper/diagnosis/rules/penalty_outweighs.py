from __future__ import annotations

import math

import numpy as np

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.facts import ModelPass
from esper.diagnosis.observation import Observation, Unknown

OUTWEIGHS = 10.0
UNLEARNED = 0.95
LATE = 150


class PenaltyOutweighs(Rule):
    """Nearly all of the loss is another term than cross-entropy, which has not fallen."""

    slug = "penalty_outweighs"
    title = "A penalty outweighs the loss"
    symptom = (
        "The first loss is ten times the cross-entropy of the outputs, and that is still what "
        "guessing has."
    )
    thresholds = (
        Threshold("first loss / cross-entropy of its outputs", OUTWEIGHS, "ratio", "chosen"),
        Threshold("cross-entropy / that of guessing", UNLEARNED, "ratio", "chosen"),
        Threshold("from step", LATE, "steps", "chosen: till then it may begin to learn"),
    )
    severity = Severity.CAUTION
    false_alarm = "A model of several outputs, of which the first is learned last."
    advice = (
        "Look at the other terms of the loss, such as a penalty on the weights, and give them a "
        "smaller factor: weight decay of 1e-4 is usual."
    )

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        first, newest = observation.first_pass, observation.last_pass
        if math.isnan(first.cross_entropy) or math.isnan(newest.cross_entropy):
            raise Unknown("the cross-entropy of the outputs is not known")
        if newest.step < LATE or newest.cross_entropy < UNLEARNED * newest.guessing_loss:
            return None
        whole = _loss_of(observation, first)
        if not whole > OUTWEIGHS * first.cross_entropy:
            return None
        return Evidence(
            observed=f"the first loss was {whole:.3g}, the cross-entropy of its outputs "
            f"{first.cross_entropy:.3g}; at step {newest.step} that is {newest.cross_entropy:.3g}, "
            f"and that of guessing {newest.guessing_loss:.3g}",
            limit="a cross-entropy that falls below that of guessing",
            signal="loss",
            value=whole / first.cross_entropy,
            since_step=first.step,
        )


def _loss_of(observation: Observation, seen: ModelPass) -> float:
    found = np.flatnonzero(observation.loss_steps == seen.step)
    return float(observation.losses[found[0]]) if len(found) else math.nan
