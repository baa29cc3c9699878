from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

PLACES, TOKENS, READ = 32, 4, 1


class MaskInverted(Rule):
    """The mask of the padding hides the tokens, and attention reads the padding."""

    slug = "mask_inverted"
    title = "The mask hides the tokens"
    symptom = "The places that attention reads hold one token, and those that it skips hold others."
    thresholds = (
        Threshold("places that are hidden", PLACES, "and more", "chosen: no chance"),
        Threshold("different tokens in them", TOKENS, "and more", "chosen: padding is one token"),
        Threshold("different tokens that are read", READ, "at most", "padding is one token"),
    )
    severity = Severity.SERIOUS
    false_alarm = "A model that is to answer from a single kind of token."
    advice = (
        "Invert the mask: key_padding_mask of torch is True where a token is padding, and "
        "attention_mask of transformers is 1 where it is none."
    )
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        masked = observation.last_pass.masked
        if not masked.places:
            raise Unknown("no mask of padding was seen")
        if masked.places < PLACES or masked.tokens < TOKENS or masked.read > READ:
            return None
        return Evidence(
            observed=f"the mask hides {masked.places} places with {masked.tokens} different "
            f"tokens, and what is left to read is {masked.read} token",
            limit="a mask that hides the padding alone",
            signal="mask",
            value=float(masked.tokens),
            since_step=observation.last_pass.step,
        )
