from __future__ import annotations

import math
from statistics import median

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

EVALUATIONS = 4
GAIN = 0.03
MEMORISED = 0.6


class MemorisedNoise(Rule):
    """The training loss falls, and the held-out loss never did: the labels cannot be predicted."""

    slug = "memorised_noise"
    title = "The model memorises noise"
    symptom = (
        "The training loss has fallen by 40 %, and no held-out loss was better than the first."
    )
    thresholds = (
        Threshold("gain of the best held-out loss", GAIN, "share", "chosen on 0 to 9"),
        Threshold("training loss / first", MEMORISED, "ratio", "chosen on 0 to 9"),
        Threshold("evaluations", EVALUATIONS, "evaluations", "chosen"),
    )
    severity = Severity.SERIOUS
    false_alarm = "Held-out data from somewhere else than the training data."
    advice = "Check that labels and inputs belong together, in both sets: they may be shuffled."
    remedies = (RemedySlug.TELL, RemedySlug.STOP_EARLY)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        held_out = [(s, loss) for s, loss in observation.held_out if math.isfinite(loss)]
        if len(held_out) < EVALUATIONS:
            raise Unknown("fewer than four held-out losses")
        first_step, first = held_out[0]
        chance = observation.first_training_loss
        if first < (1 - GAIN) * chance or first_step > 1_000:
            return None  # something was learned before the first evaluation
        if observation.training_loss_at(first_step) < MEMORISED * chance:
            raise Unknown("the training loss had fallen before the first evaluation")
        best = min(loss for _, loss in held_out)
        now = median(loss for _, loss in held_out[-3:])
        training = observation.training_loss_at(observation.step)
        if best < (1 - GAIN) * min(first, chance) or training > MEMORISED * chance or now <= first:
            return None
        return Evidence(
            observed=f"the training loss fell from {chance:.4g} to {training:.4g}; the held-out "
            f"loss was {first:.4g} at step {first_step:,}, at best {best:.4g}, and is {now:.4g}",
            limit="a held-out loss that falls with the training loss",
            signal="eval_loss",
            value=now,
            since_step=first_step,
        )
