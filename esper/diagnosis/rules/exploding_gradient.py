from __future__ import annotations

import math
from itertools import pairwise

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold, amount
from esper.diagnosis.facts import Gradients, LossKind
from esper.diagnosis.observation import Observation, Unknown

RATIO = 70.0
LARGE = 10.0
HUGE_LOSS = 1e3
GROWTH = 100.0
GROWN = 10.0
STEEP = 1e3
# Their gradient at the output of one row is at most the square root of 2.
STEADY = frozenset({LossKind.CROSS_ENTROPY, LossKind.BINARY_LOGITS})


class ExplodingGradient(Rule):
    """The gradient grows from layer to layer towards the input, or from step to step."""

    slug = "exploding_gradient"
    title = "Exploding gradient"
    symptom = "The gradient of the first layer is 70 times that of the last one, and large."
    thresholds = (
        Threshold("norm in the first layer / in the last", RATIO, "ratio", "AutoTrainer (ICSE'21)"),
        Threshold("norm in the first layer", LARGE, "L2", "chosen on seeds 0 to 9"),
        Threshold("norm of all, for a mean cross-entropy", STEEP, "L2", "chosen on seeds 0 to 9"),
        Threshold("loss", HUGE_LOSS, "units of the loss", "AutoTrainer (ICSE'21)"),
        Threshold(
            "gradient / gradient of the first step", GROWN, "ratio", "chosen on seeds 0 to 9"
        ),
        Threshold("loss / first loss", GROWTH, "ratio", "chosen on seeds 0 to 9"),
    )
    severity = Severity.SERIOUS
    false_alarm = "A sum over many elements as the loss: large from the start, and it falls."
    advice = "Clip the gradient, lower the learning rate, and start with smaller weights."
    remedies = (
        RemedySlug.CLIP_LAYER,
        RemedySlug.SET_LR,
        RemedySlug.REWIND,
        RemedySlug.REPAIR_SCALE,
    )
    opens_after = 2

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        found = self._growing_loss(observation)
        if found is not None:
            return found
        norms = observation.layer_norms(observation.last_gradients)
        names = [name for name, norm in norms.items() if norm > 0]
        if len(names) < 3:
            raise Unknown("fewer than three layers have a gradient")
        first, last = names[0], names[-1]
        if not all(math.isfinite(norms[name]) for name in names):
            raise Unknown("a gradient is not finite")
        # A gradient of the first layer is as large as the data; that is no growth in the model.
        size = norms[first] / _input_size(observation)
        ratio = size / norms[last]
        if ratio <= RATIO or size <= LARGE:
            return self._large(observation)
        rises = [(norms[a] / norms[b], a) for a, b in pairwise(names)]
        return Evidence(
            observed=f"the gradient norm is {amount(size)} in {first} and {amount(norms[last])} in "
            f"{last}, a ratio of {amount(ratio)}",
            limit=f"a ratio of at most {RATIO:g}",
            signal="grad_norm",
            value=ratio,
            began_at=max(rises)[1],
        )

    def _large(self, observation: Observation) -> Evidence | None:
        """A mean over a batch of a loss that has no steep gradient by itself."""
        seen, size = observation.first_pass, _size(observation.last_gradients)
        if seen.loss_kind not in STEADY or not seen.loss_scale < 2 or size <= STEEP:
            return None
        return Evidence(
            observed=f"the gradient norm is {amount(size)}, and the loss a mean of "
            f"{seen.loss_kind}",
            limit=f"a norm of at most {STEEP:g}",
            signal="grad_norm",
            value=size,
        )

    def _growing_loss(self, observation: Observation) -> Evidence | None:
        _, losses = observation.finite_losses()
        first, now = float(losses[0]), float(losses[-3:].min())
        if len(losses) < 3 or now < HUGE_LOSS or now < GROWTH * max(abs(first), 1e-12):
            return None
        sizes = [_size(reading) for reading in observation.gradients]
        if not sizes or not max(sizes[1:], default=0.0) > GROWN * sizes[0]:
            return None
        return Evidence(
            observed=f"the loss grew from {first:.3g} to {now:.3g}, and the gradient from "
            f"{amount(sizes[0])} to {amount(max(sizes))}",
            limit=f"at most {GROWTH:g} times the first loss",
            signal="loss",
            value=now,
            certain=True,
        )


def _input_size(observation: Observation) -> float:
    """Root mean square of the model's input, at least 1; 1 where it is not known."""
    known = observation.passes[-1].input_rms if observation.passes else 1.0
    return max(1.0, known) if math.isfinite(known) else 1.0


def _size(reading: Gradients) -> float:
    return math.sqrt(sum(row.norm**2 for row in reading.rows if not math.isnan(row.norm)))
