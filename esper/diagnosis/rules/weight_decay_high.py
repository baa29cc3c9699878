from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.facts import Gradients
from esper.diagnosis.observation import Observation

SHARE, LOWERED_SHARE = 0.05, 1e-3
PULL, LOWERED_PULL = 5.0, 0.1
FIRST_STEPS = 10


class WeightDecayHigh(Rule):
    """The weight decay shrinks the weights faster than the gradient can build them up."""

    slug = "weight_decay_high"
    title = "Too much weight decay"
    symptom = "The weight decay alone takes 5 % of the weights in each update, or more."
    thresholds = (
        Threshold(
            "share of the weights that it takes in an update", SHARE, "share",
            "chosen: half is gone after 14 updates; 0.01 of AdamW at a rate of 0.001 takes 1e-5",
        ),
        Threshold(
            "decay x weights / gradient, where an adaptive optimizer adds them", PULL, "ratio",
            "chosen: below 1 is usual before anything is learned",
        ),
        Threshold("the same only until step", FIRST_STEPS, "steps", "later a gradient may be 0"),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = "A strong penalty of a model that is meant to stay close to zero."
    advice = "Lower the weight decay: 0.01 is usual for AdamW, 1e-4 for SGD and Adam."
    remedies = (RemedySlug.WEIGHT_DECAY, RemedySlug.TELL)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        reading = observation.last_gradients
        if observation.trainable_matrices < 2:
            return None  # a linear model with a penalty, as in ridge regression
        return _of_weights(reading) or _in_gradient(reading, memory)


def _of_weights(reading: Gradients) -> Evidence | None:
    share = reading.settings.decay
    if share < SHARE:
        return None
    return Evidence(
        observed=f"the weight decay takes {share:.0%} of the weights in each update",
        limit=f"below {SHARE:.0%}; 0.01% is usual",
        signal="weight_decay",
        value=share / LOWERED_SHARE,
        since_step=reading.step,
    )


def _in_gradient(reading: Gradients, memory: Memory) -> Evidence | None:
    decay = reading.settings.decay_in_gradient
    if memory.is_open:
        # The weights have shrunk since, so only a lower decay ends it.
        pull = memory.notes["pull"] if decay >= memory.notes.get("decay", math.inf) else 0.0
    elif reading.step <= FIRST_STEPS and decay > 0:
        pull = _pull(reading, decay)
        memory.notes.update(pull=pull, decay=decay)
    else:
        return None
    if pull < PULL:
        return None
    return Evidence(
        observed=f"the weight decay adds {pull:.3g} times as much to the gradient as the loss does",
        limit=f"below {PULL:g} times",
        signal="weight_decay",
        value=pull / LOWERED_PULL,
        since_step=1,
    )


def _pull(reading: Gradients, decay: float) -> float:
    """The decay's part of the gradient / the gradient of the loss, in the norm of all matrices."""
    rows = [row for row in reading.rows if row.norm > 0 and not math.isnan(row.change)]
    gradient = math.hypot(*(row.norm for row in rows))
    return decay * math.hypot(*(row.weight_norm for row in rows)) / gradient if rows else 0.0
