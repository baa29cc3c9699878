from __future__ import annotations

from esper.contracts import Severity
from esper.contracts.spans import hidden_layers
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

WIDE = 4
LATE, UNLEARNED = 100, 0.5


class SingleUnit(Rule):
    """All that a layer passes on to the next one is a single number."""

    slug = "single_unit"
    title = "A layer has only one unit"
    symptom = (
        "A hidden layer has one unit, or one channel, between two layers that are wide, and the "
        "loss has not fallen to half."
    )
    thresholds = (
        Threshold("inputs of that layer, and outputs of the next", WIDE, "units", "chosen"),
        Threshold(
            "loss / first loss, else it is info", UNLEARNED, "ratio",
            "chosen: the order of a few classes may need no more",
        ),
        Threshold("from step, else it is info", LATE, "steps", "chosen: till then it may learn"),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "Classes that have an order, so that one number is enough for them."
    advice = "Give the layer more units: at least as many as the model has classes."
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        layers = [layer for layer in observation.infos if layer.features_in and layer.parameters]
        if not layers:
            raise Unknown("no layer was seen to run")
        if layers[0].features_in == layers[-1].features_out:
            return None  # the code of an autoencoder
        pairs = hidden_layers(layers)
        fed, feeding = {other.name for _, other in pairs}, {one.name for one, _ in pairs}
        narrow = [
            (one, other)
            for one, other in pairs
            if one.features_out == 1
            and min(one.features_in, other.features_out) >= WIDE
            # A gate beside the path reads a mean, and what it returns is multiplied.
            and (one is layers[0] or one.name in fed)
            and other.name in feeding
        ]
        if not narrow:
            return None
        one, other = narrow[0]
        told = observation.step >= LATE and observation.learned_share > UNLEARNED
        return Evidence(
            observed=f"{one.name} reads {one.features_in} numbers and passes one on, from which "
            f"{other.name} computes {other.features_out}",
            limit="more than one unit in a hidden layer",
            signal="units",
            value=1.0,
            began_at=one.name,
            since_step=1,
            severity=None if told else Severity.INFO,
        )
