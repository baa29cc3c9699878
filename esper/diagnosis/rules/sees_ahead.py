from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.sequences import COMPARED, DIFFERENT

APART = 3e-4
GAINED, OF_LEAST = 6.0, 0.5


class SeesAhead(Rule):
    """A model that predicts the next token reads tokens that come later."""

    slug = "sees_ahead"
    title = "The model sees later tokens"
    symptom = (
        "The targets are the next tokens, and the outputs at the first place, where one token has "
        "been read, depend on tokens that come later."
    )
    thresholds = (
        Threshold("compared targets, all of them the next token", COMPARED, "places", "no chance"),
        Threshold("different tokens among them", DIFFERENT, "tokens", "none by chance"),
        Threshold(
            "difference of the outputs of two sequences with one first token", APART,
            "of their size", "chosen: measured 0 without a leak, and rounding is left out",
        ),
        Threshold(
            "loss at the first place below the least that one token allows, summed", GAINED, "nats",
            "by definition above 0; chosen: random numbers, as of dropout, move it by 2",
        ),
        Threshold("the same / that least loss", OF_LEAST, "share", "chosen"),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = "A model that has more than these tokens to read: an image, or earlier batches."
    advice = (
        "Mask the attention so that each token sees itself and earlier ones alone, as "
        "is_causal=True does; take its softmax over the keys, the last axis; use no "
        "bidirectional layer, and batch_first=True for inputs that have the batch first."
    )
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        known = [seen for seen in observation.passes if not math.isnan(seen.ahead.gained)]
        if not known:
            raise Unknown("no two sequences with one first token were seen")
        for seen in known:
            if seen.ahead.distance > APART:
                return _evidence(
                    "sequences that begin with the same token have outputs at that place that "
                    f"differ by {seen.ahead.distance:.2g} of their size",
                    seen.ahead.distance,
                    seen.step,
                )
        gained = least = 0.0
        for seen in reversed(known):
            gained, least = gained + seen.ahead.gained, least + seen.ahead.least
            if gained > max(GAINED, OF_LEAST * least):
                return _evidence(
                    f"the losses at the first place add up to {least - gained:.3g}, and one token "
                    f"allows {least:.3g} at least",
                    gained,
                    seen.step,
                )
        return None


def _evidence(observed: str, value: float, step: int) -> Evidence:
    return Evidence(
        observed=observed,
        limit="outputs that depend on the tokens so far",
        signal="outputs",
        value=value,
        since_step=step,
    )
