from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.gradient_probe import READINGS
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.updates import EXCESSIVE

DEAD = 0.85
MANY = 0.7
STILL = 0.5
SATURATED = 0.3
STEPS, UNLEARNED, GUESSES = 100, 0.99, 50
SAMPLES = 64
HALF = 0.5


class DyingRelu(Rule):
    """Most units of a layer are off for every input; they and the layers before stop learning."""

    slug = "dying_relu"
    title = "Dying ReLU"
    symptom = "Most units of a layer have a gradient of exactly zero, reading after reading."
    thresholds = (
        Threshold("units without a gradient", DEAD, "share", "chosen on seeds 0 to 9"),
        Threshold(
            "the same, as info while the run learns", MANY, "share",
            "AutoTrainer (ICSE'21), DeepDiagnosis; half of the narrow nets of seeds 0 to 9 learn",
        ),
        Threshold(f"loss / first loss after {STEPS} steps", UNLEARNED, "ratio", "below it learns"),
        Threshold(f"{GUESSES} losses / that of guessing", UNLEARNED, "ratio", "chosen; the same"),
        Threshold(
            "the same, where an update was far too large", HALF, "ratio",
            "chosen: not only a narrow net, and one that learns half is left alone",
        ),
        Threshold("readings in a row", READINGS, "readings", "chosen: small batches miss units"),
        Threshold("samples in them", SAMPLES, "samples", "chosen: four samples find few units"),
        Threshold("to resolve", STILL, "share", "chosen"),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = (
        "A layer whose inputs are mostly zero, or a mixture that does not use its experts."
    )
    advice = (
        "If it was sudden, return to a checkpoint before it with a lower learning rate; otherwise "
        "give the dead units a new start, or use LeakyReLU, GELU or normalisation."
    )
    remedies = (
        RemedySlug.REWIND,
        RemedySlug.RECYCLE,
        RemedySlug.REPAIR_SCALE,
        RemedySlug.SET_LR,
    )
    explained_by = frozenset({"non_finite", "unreached", "rate_jump", "weight_decay_high"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        reading = observation.last_gradients
        if reading.readings < READINGS:
            raise Unknown("too few readings of the gradients")
        known = {tensor.name for tensor in observation.tensors}
        shares: dict[str, float] = {}
        for row in reading.rows:
            if row.name in known and not math.isnan(row.dead_rows) and math.isfinite(row.norm):
                # The smallest of a layer's matrices: a recurrent one may have no past to learn.
                layer = row.name.rpartition(".")[0]
                shares[layer] = min(row.dead_rows, shares.get(layer, 1.0))
        ordered = [name for name in observation.layers if name in shares]
        if len(ordered) < 2:
            raise Unknown("fewer than two layers have units whose gradient is known")
        if all(shares[name] == 1 for name in ordered) and not observation.some_gradient:
            raise Unknown("the whole gradient is zero")
        limit = STILL if memory.is_open else MANY
        # The last layer has no activation of its own: what follows it is the loss. Behind a layer
        # that is dead as a whole, everything before it is without gradient too: it began there.
        alive: set[str] = memory.notes.setdefault("alive", set())
        alive.update(name for name in ordered if shares[name] < 1)
        never = set(ordered) - alive
        others = _saturated(observation) | _unchosen(observation) | _not_off(observation, never)
        dead = [n for n in ordered[:-1] if shares[n] >= limit and n not in others]
        if not dead:
            memory.notes.pop("first", None)
            return None
        if not _were_enough(observation, memory):
            raise Unknown("the batches are small: too few samples were seen since")
        whole = [name for name in dead if shares[name] >= DEAD]
        worst = (whole or dead)[-1]
        harms = whole or _stands_still(observation) or _was_killed(observation)
        return Evidence(
            observed=f"{shares[worst]:.0%} of the units of {worst} had a gradient of exactly zero "
            f"in {READINGS} readings in a row",
            limit=f"less than {MANY:.0%}",
            signal="grad",
            value=shares[worst],
            began_at=worst,
            severity=None if harms else Severity.INFO,
        )


def _were_enough(observation: Observation, memory: Memory) -> bool:
    """So many samples went through the layers while the units had no gradient."""
    reading = observation.last_gradients.readings
    more = reading - int(memory.notes.setdefault("first", reading))
    shape = observation.last_pass.output_shape if observation.passes else ()
    rows = math.prod(shape[:-1]) if len(shape) > 1 else SAMPLES
    return (READINGS + more) * max(1, rows) >= SAMPLES


def _stands_still(observation: Observation) -> bool:
    """Enough steps were made, and nothing was learned."""
    try:
        if observation.step < STEPS:
            return False
        return observation.learned_share >= UNLEARNED or _guesses(observation)
    except Unknown:
        return False


def _was_killed(observation: Observation) -> bool:
    """An update was far too large, and little was learned since."""
    if not observation.update_excess > EXCESSIVE or not observation.passes:
        return False
    chance = observation.first_pass.guessing_loss
    losses = observation.losses[-GUESSES:]
    return len(losses) > 0 and float(np.median(losses)) >= HALF * chance


def _guesses(observation: Observation) -> bool:
    """Whatever the first loss was: a start that was far too high is left without learning."""
    chance = observation.first_pass.guessing_loss
    return float(np.median(observation.finite_losses()[1][-GUESSES:])) >= UNLEARNED * chance


def _unchosen(observation: Observation) -> set[str]:
    """Layers of experts that the router did not choose: dead_experts tells of them.

    Nothing in such a module has a gradient, not even its last bias, while the module beside it and
    what runs before both have one. Units that die in a chain leave nothing alive before them.
    """
    alive = {row.name.rpartition(".")[0] for row in observation.last_gradients.rows if row.norm > 0}
    before: set[str] = set()
    experts: dict[str, list[str]] = {}
    for layer in observation.layers:
        for expert in _numbered_around(layer):
            if before & alive:
                experts.setdefault(expert, []).append(layer)
        before.add(layer)
    used = {expert.rpartition(".")[0] for expert, own in experts.items() if alive & {*own}}
    return {
        layer
        for expert, own in experts.items()
        if len(own) > 1 and not alive & {*own} and expert.rpartition(".")[0] in used
        for layer in own
    }


def _not_off(observation: Observation, never: set[str]) -> set[str]:
    """Of the layers that never had a gradient, those behind which nothing is off.

    The output of an activation that is off is zero, and so is the input of what comes after it.
    Where no later input is, the layer has no gradient for another reason, and may need none: a gate
    that is still closed, attention over a single key, a choice that is passed straight through.
    """
    if not observation.passes:
        return set()
    found: set[str] = set()
    off = False
    for one in reversed(observation.last_pass.layers):
        if one.layer in never and not off:
            found.add(one.layer)
        off = off or not one.input_zeros < DEAD  # NaN: unknown
    return found


def _numbered_around(layer: str) -> list[str]:
    """The numbered modules that the layer is in."""
    parts = layer.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts[:-1]) if part.isdigit()]


def _saturated(observation: Observation) -> set[str]:
    """Layers whose sigmoid or tanh is at its ends, where the gradient rounds to zero as well."""
    if not observation.passes:
        return set()
    passes = observation.last_pass.layers
    return {a.layer for a, b in pairwise(passes) if b.input_extremes > SATURATED}
