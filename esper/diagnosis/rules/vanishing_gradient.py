from __future__ import annotations

from itertools import pairwise

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold, amount
from esper.diagnosis.observation import Observation, Unknown

RATIO = 1e-3
SMALL = 1e-4
DEPTH = 3
HOPELESS = 1e-6
WAITS, GROWN = 30, 2.0
PAIR = 2


_WIDER = (
    "A LayerNorm over two numbers leaves only which of them is larger, so no gradient comes "
    "through it. Make the layer wider, or leave the normalisation out."
)


class VanishingGradient(Rule):
    """The gradient shrinks from layer to layer towards the input, so the first ones stand still."""

    slug = "vanishing_gradient"
    title = "Vanishing gradient"
    symptom = "The gradient of the first layer is a thousandth of that of the last one, and tiny."
    thresholds = (
        Threshold("norm in the first layer / in the last", RATIO, "ratio", "AutoTrainer (ICSE'21)"),
        Threshold("norm in the first layer", SMALL, "L2", "AutoTrainer (ICSE'21)"),
        Threshold(
            "the ratio, at once also with an adaptive optimizer", HOPELESS, "ratio",
            "chosen: deep runs of Adam that learn begin with 5e-6 or more",
        ),
        Threshold(
            f"that norm after {WAITS} steps of an adaptive optimizer / at first", GROWN, "ratio",
            "chosen: its updates are as large where the gradient is faint, so that it grows",
        ),
        Threshold(
            "numbers that a LayerNorm normalises together, told only", PAIR, "numbers",
            "(a - b) / abs(a - b) is 1 or -1, whatever the weights are",
        ),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = "A first layer that is frozen in all but name, or an adapter at birth."
    advice = (
        "Start with larger weights, use ReLU-like activations, normalisation or residual "
        "connections; fewer layers may do as well."
    )
    remedies = (RemedySlug.REPAIR_SCALE, RemedySlug.SPAN, RemedySlug.TELL)
    opens_after = 3
    explained_by = frozenset({"dying_relu", "non_finite", "weight_decay_high"})

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
        adapts = ratio >= HOPELESS and not observation.follows_gradient
        if adapts and self._grows(observation, first):
            return None
        pair = _normalised_in_pairs(observation)
        # Where it is lost: the layer behind the steepest fall.
        falls = [(living[a] / living[b], a) for a, b in pairwise(names)]
        return Evidence(
            observed=f"the gradient norm is {amount(living[first])} in {first} and "
            f"{amount(living[last])} in {last}, a ratio of {amount(ratio)}",
            limit=f"a ratio of at least {RATIO:g}",
            signal="grad_norm",
            value=ratio,
            began_at=pair or min(falls)[1],
            advice=_WIDER if pair else "",
            only_tell=bool(pair),  # no weights and no rate let a gradient through
        )

    def _grows(self, observation: Observation, layer: str) -> bool:
        reading = observation.last_gradients
        if reading.step < WAITS:
            raise Unknown("an adaptive optimizer may still raise the gradient of the first layers")
        before = observation.layer_norms(observation.gradients[0]).get(layer, 0.0)
        return observation.layer_norms(reading).get(layer, 0.0) >= GROWN * before > 0


def _normalised_in_pairs(observation: Observation) -> str:
    """Name of such a LayerNorm; empty: there is none."""
    norms = (info for info in observation.infos if info.kind == "LayerNorm")
    return next((n.name for n in norms if n.out_shape and n.out_shape[-1] <= PAIR), "")
