from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, TensorFacts, Unknown

WINDOW = 1_000
FALL = 0.25
HELD_OUT_FALL = 0.1
EVALUATIONS = 6
GAP = 0.5
LEARNED = 0.98
LEFT = 0.02
NARROW = 0.5
DECAYED = 0.5


class Capacity(Rule):
    """Training and held-out loss are stuck together, and a hidden layer is a strict bottleneck."""

    slug = "capacity"
    title = "Too little capacity"
    symptom = (
        "Training loss and held-out loss stay high together, and a hidden layer has at most half "
        "as many units as the layers on both sides of it."
    )
    thresholds = (
        Threshold("steps", WINDOW, "steps", "chosen: shorter flat stretches end by themselves"),
        Threshold("fall of the training loss in them", FALL, "share", "chosen"),
        Threshold("fall of the held-out loss", HELD_OUT_FALL, "share", "chosen"),
        Threshold("held-out above training loss", GAP, "share", "above it, it is over-fitting"),
        Threshold("loss / first loss, at least", LEFT, "ratio", "chosen: little is left to gain"),
        Threshold("hidden units / narrower neighbour", NARROW, "ratio", "chosen"),
    )
    severity = Severity.CAUTION
    false_alarm = "A code that is narrow on purpose, or labels that no model could predict."
    advice = 'Add hidden units: session.graft(layer, "widen_hidden", since=...).'
    remedies = (RemedySlug.SPAN,)
    opens_after = 2
    explained_by = frozenset(
        {
            "non_finite", "nothing_moves", "dying_relu", "vanishing_gradient", "exploding_gradient",
            "update_ratio_low", "update_ratio_high", "rate_jump", "over_fitting", "memorised_noise",
            "slow_convergence", "oscillating_loss", "loss_spike", "saturation", "wrong_loss",
            "wrong_output_activation", "frozen_part", "not_held", "unreached",
            "gradients_not_zeroed", "bad_initialisation", "repeated_initialisation",
            "training_in_eval_mode", "abnormal_data",
        }
    )  # fmt: skip

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        first, last, units = bottleneck(observation)
        if not units:
            return None
        fall, level = self._training(observation)
        held_fall, held = self._held_out(observation)
        start = observation.first_training_loss
        if not LEFT * start < level < LEARNED * start or held > (1 + GAP) * level:
            return None
        if fall > FALL or held_fall > HELD_OUT_FALL:
            return None
        return Evidence(
            observed=f"in {WINDOW} steps the training loss fell by {fall:.1%} to {level:.4g} and "
            f"the held-out loss by {held_fall:.1%} to {held:.4g}; between {first} and {last} are "
            f"only {units} units",
            limit=f"a fall above {FALL:.0%} and {HELD_OUT_FALL:.0%}, or a wider hidden layer",
            signal="loss",
            value=fall,
            began_at=last,
            since_step=max(1, observation.step - WINDOW),
        )

    def _training(self, observation: Observation) -> tuple[float, float]:
        """(fall over the window, level now)."""
        steps, losses = observation.finite_losses()
        if int(steps[-1] - steps[0]) < 2 * WINDOW:
            raise Unknown(f"fewer than {2 * WINDOW} steps")
        if observation.is_warming_up or observation.rate_share < DECAYED:
            raise Unknown("the schedule changes the learning rate, and the loss with it")
        now = losses[steps > steps[-1] - WINDOW // 4]
        before = losses[(steps <= steps[-1] - WINDOW) & (steps > steps[-1] - WINDOW * 5 // 4)]
        if not len(before):
            raise Unknown("the losses of the window are not kept")
        return _fall(float(np.mean(before)), float(np.mean(now))), float(np.mean(now))

    def _held_out(self, observation: Observation) -> tuple[float, float]:
        known = [(s, loss) for s, loss in observation.held_out if math.isfinite(loss)]
        now = [loss for s, loss in known if s > observation.step - WINDOW // 2]
        before = [loss for s, loss in known if s <= observation.step - WINDOW // 2]
        if len(known) < EVALUATIONS or not now or not before:
            raise Unknown("too few held-out losses; pass evaluate= to attach")
        return _fall(min(before), min(now)), float(np.median(now))


def bottleneck(observation: Observation) -> tuple[str, str, int]:
    """(layer before, layer behind, units) of the narrowest hidden layer; 0 units: none is narrow.

    Raises:
        Unknown: the shapes of the weights were not read.
    """
    matrices = _linear(observation)
    if not matrices:
        raise Unknown("no linear layer was seen before the first update")
    found: tuple[str, str, int] = ("", "", 0)
    if matrices[0].shape[1] == matrices[-1].shape[0]:
        return found  # an autoencoder, whose code is narrow on purpose
    for one, other in pairwise(matrices):
        units = one.shape[0]
        narrow = units <= NARROW * min(one.shape[1], other.shape[0])
        if units == other.shape[1] and narrow and (not found[2] or units < found[2]):
            found = one.layer, other.layer, units
    return found


def _linear(observation: Observation) -> list[TensorFacts]:
    """Weights of the linear layers, in the order of execution."""
    weights = {t.layer: t for t in observation.tensors if t.kind == "Linear" and len(t.shape) == 2}
    return [weights[name] for name in observation.layers if name in weights]


def _fall(before: float, now: float) -> float:
    return (before - now) / abs(before) if before else 0.0
