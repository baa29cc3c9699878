from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

FEWEST = 3


class NoActivation(Rule):
    """All linear layers follow one another directly, so that together they are one linear layer."""

    slug = "no_activation"
    title = "No activation between linear layers"
    symptom = "Each linear layer reads the output of the one before as it is."
    thresholds = (
        Threshold("linear layers", FEWEST, "layers", "two may be a factorised weight"),
        Threshold("layers that read a linear layer's output", 1, "share", "by definition"),
    )
    severity = Severity.CAUTION
    false_alarm = "A deep linear network, as in studies of the theory of training."
    advice = "Put an activation such as ReLU or GELU between the layers."
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        passes = observation.last_pass.layers
        linear = [entry for entry in passes if entry.kind == "Linear"]
        if not linear:
            raise Unknown("no linear layer was seen")
        if len(linear) < FEWEST or len(linear) < len(passes):
            return None
        if not all(entry.follows for entry in linear[1:]):
            return None
        return Evidence(
            observed=f"the {len(linear)} linear layers from {linear[0].layer} to "
            f"{linear[-1].layer} have nothing between them",
            limit="an activation between two linear layers",
            signal="activation",
            value=float(len(linear)),
            began_at=linear[0].layer,
            since_step=1,
        )
