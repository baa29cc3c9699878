from __future__ import annotations

import math

import numpy as np

from esper.contracts import Severity, Signal
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import CAME_TRAINED, Observation, Unknown
from esper.diagnosis.updates import BY_DECAY, is_decay_alone

LOW, LOW_OF_ADAPTIVE = 1e-5, 1e-4
RECENT = 0.5
SCHEDULED = 0.3
UNLEARNED = 0.95
LONG_WARM_UP, WARM_UP, DOUBLED = 300, 100, 2.0
FEWEST_LOSSES, LEVEL_LOSSES = 20, 50
_WARMS_UP = (
    "The learning rate still rises: shorten its warm-up, such as warmup_steps of a transformers "
    "Trainer, or raise the rate that it rises to."
)
_DECAYS = (
    "The updates are the weight decay alone, and a higher learning rate would raise it too. Look "
    "for what makes the gradients so small: a clipping to a tiny norm, or a loss that is divided "
    "twice."
)


def _warm_up(observation: Observation) -> int:
    """Steps in which the rate may rise."""
    known = [rate for _, rate in observation.rates if math.isfinite(rate)]
    return WARM_UP if known[-1] < DOUBLED * known[0] else LONG_WARM_UP


class UpdateRatioLow(Rule):
    """Updates are so small that the weights stay where they were born."""

    slug = "update_ratio_low"
    title = "Updates are too small"
    symptom = "No recent update was 1e-5 of the weights in the median, and the loss stands still."
    thresholds = (
        Threshold("median of update / weight", LOW, "ratio", "1e-3 is usual; chosen on 0 to 9"),
        Threshold(
            "the same, of an adaptive optimizer", LOW_OF_ADAPTIVE, "ratio",
            "chosen: its updates do not grow once the gradient does",
        ),
        Threshold(
            "readings that are below it", RECENT, "share, the newest",
            "chosen: where the gradient is faint at first, updates pass below it and grow again",
        ),
        Threshold(
            "rate / largest rate so far", SCHEDULED, "share", "below it the schedule is meant"
        ),
        Threshold(
            "steps of a rate that still rises", LONG_WARM_UP, "steps",
            "chosen: a warm-up of 10,000 steps to updates of 0.001 passes 1e-5 at step 100",
        ),
        Threshold(
            "the same, of a rate that has hardly risen", WARM_UP, "steps",
            "chosen: to bring such updates to 0.001 it has to rise 100-fold",
        ),
        Threshold("rate / the first one, of such a rate", DOUBLED, "ratio", "chosen"),
        Threshold("loss / first loss", UNLEARNED, "ratio", "below it the run learns"),
        Threshold(
            "first losses / that of guessing", CAME_TRAINED, "ratio",
            "chosen: below it the model was trained before, and small updates are meant",
        ),
        Threshold(
            "update / weight decay, below which the gradient has no part in it", BY_DECAY, "ratio",
            "by definition: the part of the gradient is less than half of the decay's",
        ),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "A fine-tuning that starts close to its optimum."
    advice = "Raise the learning rate, by a factor of ten first."
    remedies = (RemedySlug.MATCH_UPDATES, RemedySlug.SET_LR, RemedySlug.TELL)
    opens_after = 2
    explained_by = frozenset(
        {
            "nothing_moves",
            "not_held",
            "vanishing_gradient",
            "dying_relu",
            "non_finite",
            "rate_vanished",
            "clipped_to_nothing",
        }
    )

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        ratios = observation.update_ratios
        step = ratios[-1][0]
        if memory.notes.get("step") == step:
            raise Unknown("no newer update was measured")
        memory.notes["step"] = step
        if observation.searches or observation.estimates_rate:
            raise Unknown("the optimizer finds the size of its updates by itself")
        if observation.is_warming_up and observation.step < _warm_up(observation):
            raise Unknown("the learning rate still rises")
        ratio = max(ratio for _, ratio in ratios[-math.ceil(RECENT * len(ratios)) :])
        if ratio == 0:
            raise Unknown("nothing moved, which other rules explain")
        low = LOW if observation.follows_gradient else LOW_OF_ADAPTIVE
        if ratio >= low or observation.rate_share < SCHEDULED:
            return None
        losses = observation.finite_losses()[1]
        if len(losses) < FEWEST_LOSSES:
            raise Unknown("too few losses")
        half = min(len(losses) // 2, LEVEL_LOSSES)
        first, level = observation.first_training_loss, float(np.median(losses[-half:]))
        if first <= 0 or level < UNLEARNED * first or observation.came_trained:
            return None
        advice = _WARMS_UP if observation.is_warming_up else ""
        if observation.gradients and is_decay_alone(ratio, observation.last_gradients.settings):
            advice = _DECAYS
        return Evidence(
            observed=f"up to step {step:,} the median update is at most {ratio:.1e} of its weight, "
            f"and the loss is {level / first:.0%} of the first",
            limit=f"at least {low:g}; about 0.001 is usual",
            signal=Signal.UPDATE_RATIO,
            value=ratio,
            advice=advice,
            only_tell=bool(advice),  # a factor would grow with the rate, or multiply the decay
        )
