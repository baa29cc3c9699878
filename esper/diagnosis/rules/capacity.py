from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from esper.contracts import LayerInfo, Severity
from esper.contracts.spans import hidden_layers
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

WINDOW = 1_000
FALL = 0.25
HELD_OUT_FALL = 0.1
EVALUATIONS = 6
GAP = 0.5
LEARNED = 0.98
LEFT = 0.02
NOISE = 2.0
WORSE = 0.05
DOUBT = 3.0  # standard errors
NARROW = 0.5
BLOCK = 1.0
DECAYED = 0.5
# Without a held-out loss.
ALONE_FALL = 0.1
ALONE_WINDOWS = 3
ALONE_NARROW = 0.5


class Capacity(Rule):
    """The losses are stuck, and a hidden layer is a strict bottleneck."""

    slug = "capacity"
    title = "The model has too little capacity"
    symptom = (
        "Training loss and held-out loss stay high together, and a hidden layer, between two "
        "linear layers or two convolutions, has at most half as many units or channels as come in "
        "before it and go out behind it; in the feed-forward part of a block, at most as many. "
        "Without a held-out loss the training loss must stay flatter for longer, and the layer "
        "must be half as wide as that."
    )
    thresholds = (
        Threshold("steps", WINDOW, "steps", "chosen: shorter flat stretches end by themselves"),
        Threshold("fall of the training loss in them", FALL, "share", "chosen"),
        Threshold("fall of the held-out loss", HELD_OUT_FALL, "share", "chosen"),
        Threshold("held-out above training loss", GAP, "share", "above it, it is over-fitting"),
        Threshold("loss / first loss, at least", LEFT, "ratio", "chosen: little is left to gain"),
        Threshold("loss / its deviation between steps", NOISE, "ratio", "chosen: below is noise"),
        Threshold("loss above its best so far", WORSE, "share", "chosen: it fell back, or is ill"),
        Threshold("hidden units / narrower neighbour", NARROW, "ratio", "chosen"),
        Threshold("hidden units / width of a block", BLOCK, "ratio", "usual: 4, Vaswani 2017"),
        Threshold("fall without a held-out loss", ALONE_FALL, "share", "chosen"),
        Threshold("steps without a held-out loss", ALONE_WINDOWS * WINDOW, "steps", "chosen"),
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
            "training_in_eval_mode", "abnormal_data", "rate_vanished",
            "weight_decay_high", "constant_output", "dropout_high", "frozen_at_random",
            "sorted_data", "momentum_high", "clipped_to_nothing",
        }
    )  # fmt: skip

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        narrowest = bottleneck(observation)
        if narrowest is None:
            return None
        first, last, share = narrowest
        alone = not observation.held_out
        if alone and share > ALONE_NARROW:
            return None
        fall, level = self._training(observation, ALONE_WINDOWS if alone else 2)
        start = observation.first_training_loss
        if not LEFT * start < level < LEARNED * start or fall > (ALONE_FALL if alone else FALL):
            return None
        held = "no held-out loss is measured" if alone else self._held_out(observation, level)
        if not held:
            return None
        units = first.features_out
        return Evidence(
            observed=f"in {WINDOW:,} steps the training loss {_change(fall)} to {level:.4g}, and "
            f"{held}; between {first.name} and {last.name} are only {units} units",
            limit=f"a fall above {ALONE_FALL if alone else FALL:.0%}, or a wider hidden layer",
            signal="loss",
            value=fall,
            began_at=last.name,
            since_step=max(1, observation.step - WINDOW),
        )

    def _training(self, observation: Observation, windows: int) -> tuple[float, float]:
        """(fall over the window, level now); a level in the noise counts as none."""
        steps, losses = observation.finite_losses()
        if int(steps[-1] - steps[0]) < windows * WINDOW:
            raise Unknown(f"fewer than {windows * WINDOW} steps")
        if observation.is_warming_up or observation.rate_share < DECAYED:
            raise Unknown("the schedule changes the learning rate, and the loss with it")
        now = losses[steps > steps[-1] - WINDOW // 4]
        before = losses[(steps <= steps[-1] - WINDOW) & (steps > steps[-1] - WINDOW * 5 // 4)]
        if not len(before):
            raise Unknown("the losses of the window are not kept")
        level = float(np.mean(now))
        best, doubt = _best(steps, losses)
        if level > best + max(WORSE * abs(best), doubt):
            raise Unknown("the loss was lower before, so capacity is not what the run lacks")
        above_noise = level > NOISE * float(np.std(now))
        return _fall(float(np.mean(before)), level), level if above_noise else 0.0

    def _held_out(self, observation: Observation, level: float) -> str:
        """What the held-out loss says; empty where it is not stuck beside the training loss."""
        known = [(s, loss) for s, loss in observation.held_out if math.isfinite(loss)]
        now = [loss for s, loss in known if s > observation.step - WINDOW // 2]
        before = [loss for s, loss in known if s <= observation.step - WINDOW // 2]
        if len(known) < EVALUATIONS or not now or not before:
            raise Unknown("too few held-out losses yet")
        fall, held = _fall(min(before), min(now)), float(np.median(now))
        if abs(fall) > HELD_OUT_FALL or held > (1 + GAP) * level:
            return ""
        return f"the held-out loss {_change(fall)} to {held:.4g}"


def bottleneck(observation: Observation) -> tuple[LayerInfo, LayerInfo, float] | None:
    """(layer before, layer behind, units / the most that is narrow) of the narrowest hidden layer.

    None: no hidden layer is narrow, or it is so on purpose: the code of an autoencoder, and the
    adapter of a model most of which is frozen.

    Raises:
        Unknown: the layers were not seen to run.
    """
    layers = [layer for layer in observation.infos if layer.features_in and layer.parameters]
    if not layers:
        raise Unknown("no layer was seen to run")
    if layers[0].features_in == layers[-1].features_out or observation.frozen > (
        observation.trainable
    ):
        return None
    shares = [
        (one, other, one.features_out / _narrow(one, other, first=one is layers[0]))
        for one, other in hidden_layers(layers)
        if one.kind == other.kind and one.groups == other.groups == 1
    ]
    return min((found for found in shares if found[2] <= 1), key=lambda f: f[2], default=None)


def _narrow(one: LayerInfo, other: LayerInfo, *, first: bool) -> float:
    """So many units between two layers are few."""
    if one.has_sequence and one.features_in == other.features_out:
        return BLOCK * one.features_in  # the feed-forward part of a block
    # A convolution of an image reads few channels, but many pixels.
    incoming = one.features_in * (math.prod(one.kernel_size) if first else 1)
    return NARROW * min(incoming, other.features_out)


def _best(steps: NDArray[np.int64], losses: NDArray[np.float64]) -> tuple[float, float]:
    """The lowest mean of the loss over a quarter of a window so far, and how unsure it is."""
    parts = (steps - steps[0]) // (WINDOW // 4)
    counts = np.bincount(parts)
    known = counts * 2 >= counts.max()
    means = (np.bincount(parts, weights=losses)[known]) / counts[known]
    lowest = int(np.argmin(means))
    chosen = losses[parts == np.flatnonzero(known)[lowest]]
    return float(means[lowest]), DOUBT * float(np.std(chosen)) / math.sqrt(len(chosen))


def _change(fall: float) -> str:
    return f"{'fell' if fall >= 0 else 'rose'} by {abs(fall):.1%}"


def _fall(before: float, now: float) -> float:
    return (before - now) / abs(before) if before else 0.0
