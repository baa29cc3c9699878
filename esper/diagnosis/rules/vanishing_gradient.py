from __future__ import annotations

from itertools import pairwise

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

RATIO = 1e-3
SMALL = 1e-4
DEPTH = 3


class VanishingGradient(Rule):
    """The gradient shrinks from layer to layer towards the input, so the first ones stand still."""

    slug = "vanishing_gradient"
    title = "Vanishing gradient"
    symptom = "The gradient of the first layer is a thousandth of that of the last one, and tiny."
    thresholds = (
        Threshold("norm in the first layer / in the last", RATIO, "ratio", "AutoTrainer (ICSE'21)"),
        Threshold("norm in the first layer", SMALL, "L2", "AutoTrainer (ICSE'21)"),
    )
    severity = Severity.SERIOUS
    false_alarm = "A first layer that is frozen in all but name, or an adapter at birth."
    advice = (
        "Start with larger weights, use ReLU-like activations, normalisation or residual "
        "connections; fewer layers may do as well."
    )
    remedies = (RemedySlug.REPAIR_SCALE, RemedySlug.SPAN, RemedySlug.TELL)
    opens_after = 3
    explained_by = frozenset({"dying_relu", "non_finite"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        norms = observation.layer_norms(observation.last_gradients)
        living = {name: norm for name, norm in norms.items() if 0 < norm < float("inf")}
        names = list(living)
        if len(names) < DEPTH:
            raise Unknown("fewer than three layers have a gradient")
        first, last = names[0], names[-1]
        limit = RATIO * (10 if memory.is_open else 1)
        ratio = living[first] / living[last]
        if ratio >= limit or living[first] >= SMALL * (10 if memory.is_open else 1):
            return None
        # Where it is lost: the layer behind the steepest fall.
        falls = [(living[a] / living[b], a) for a, b in pairwise(names)]
        return Evidence(
            observed=f"the gradient norm is {living[first]:.1e} in {first} and "
            f"{living[last]:.1e} in {last}, a ratio of {ratio:.1e}",
            limit=f"a ratio of at least {RATIO:g}",
            signal="grad_norm",
            value=ratio,
            began_at=min(falls)[1],
        )
