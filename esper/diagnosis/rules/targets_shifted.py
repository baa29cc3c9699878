from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.sequences import COMPARED, DIFFERENT

COPIED = 0.1
TWICE = 2


class TargetsShifted(Rule):
    """The targets of a model of sequences are its own input, or the tokens after the next ones."""

    slug = "targets_shifted"
    title = "The targets are not the next tokens"
    symptom = (
        "The targets are the tokens that the model reads at the same places, or those two places "
        "later, where a language model predicts the next ones."
    )
    thresholds = (
        Threshold("compared places, all of them equal", COMPARED, "places", "none by chance"),
        Threshold("different tokens among them", DIFFERENT, "tokens", "none by chance"),
        Threshold(
            "loss / that of guessing, of equal places; until then info", COPIED, "ratio",
            "chosen: to copy is learned at once, to predict is not",
        ),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "An autoencoder of tokens; a head that predicts the token after the next one."
    advice = (
        "If the model predicts the next token: give it tokens[:, :-1], with tokens[:, 1:] as "
        "targets. Models that shift the labels by themselves, as those of transformers do, take "
        "labels that are equal to the input."
    )
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        seen = observation.first_pass
        if seen.lag < 0:
            raise Unknown("the targets are not compared with the input")
        if seen.lag not in (0, TWICE):
            return None
        where = "at the same places" if seen.lag == 0 else "two places later: shifted twice"
        loss = float(min(observation.finite_losses()[1]))
        told = seen.lag == TWICE or loss < COPIED * math.log(max(2, seen.classes))
        return Evidence(
            observed=f"the targets are the tokens of the model's input {where}",
            limit="the next tokens, where a model predicts them",
            signal="targets",
            value=float(seen.lag),
            since_step=1,
            severity=None if told else Severity.INFO,
        )
