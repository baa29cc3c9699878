from __future__ import annotations

import math
from dataclasses import replace
from statistics import median

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.facts import LayerPass, ModelPass
from esper.diagnosis.observation import Observation, Unknown

ALIKE = 1e-3
DIFFERENT = 0.1
FAINT, BEHIND_GATES = 0.01, 1e-4
BLOWN_UP = 100.0
SMALL_GAIN, LARGE_GAIN = 0.02, 8.0
ABOVE_CHANCE, FAR_ABOVE_CHANCE = 5.0, 10.0
LEARNED = 0.7
ROUNDING = 5e-7
WAITS, GROWN = 30, 2.0
RECURRENT = ("RNN", "LSTM", "GRU")


class BadInitialisation(Rule):
    """The first weights lose the signal on its way, or blow it up, before anything is learned."""

    slug = "bad_initialisation"
    title = "Bad initialisation"
    symptom = (
        "Before the first update all inputs look alike to the last layer, or the loss is high."
    )
    thresholds = (
        Threshold(
            "spread of a batch at the last layer", ALIKE, "share of its size", "chosen on 0 to 9"
        ),
        Threshold(
            "std of the last layer's input, absolute and of the first's",
            FAINT,
            "std",
            "chosen on seeds 0 to 9",
        ),
        Threshold(
            "the same, of a recurrent layer and one more", BEHIND_GATES, "std",
            "chosen: gates of usual weights let 0.003 through",
        ),
        Threshold(
            "std of the last layer's input / the first's, and absolute",
            BLOWN_UP,
            "ratio",
            "chosen on seeds 0 to 9",
        ),
        Threshold(
            "std of weights x sqrt(inputs), too small", SMALL_GAIN, "gain", "0.3 to 1.5 is usual"
        ),
        Threshold(
            "std of weights x sqrt(inputs), too large", LARGE_GAIN, "gain", "0.3 to 1.5 is usual"
        ),
        Threshold("first loss / chance", FAR_ABOVE_CHANCE, "ratio", "chosen; above 5 it is info"),
        Threshold(
            "what is left of a lost signal", ROUNDING, "share of its size", "rounding of float32"
        ),
        Threshold(
            f"a lost signal after {WAITS} steps / at first", GROWN, "ratio",
            "chosen on seeds 0 to 9: runs that learn have 2.5 or more, others 1.1; till then info",
        ),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = (
        "Adapters and heads that start at zero on purpose; a very low learning rate, at which a "
        "lost signal grows later; deep nets without biases, some of which Adam trains all the same."
    )
    advice = (
        "Initialise so that each layer keeps the scale of its input, such as Kaiming or Xavier."
    )
    remedies = (RemedySlug.REPAIR_SCALE, RemedySlug.TELL)
    closes_after = 2
    explained_by = frozenset({"abnormal_data"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if not observation.tensors:
            raise Unknown("the weights before the first update are not known")
        first = float(observation.finite_losses()[1][0])
        if observation.step > 3 and not memory.is_open:
            return None
        if observation.step > 3 and observation.loss < LEARNED * first:
            return None  # it learns in spite of it
        # Later it may have been repaired, so the present state counts.
        is_young = observation.step <= 3
        seen = observation.first_pass if is_young else observation.last_pass
        gains = _gains_at_birth(observation) if is_young else _gains_now(observation)
        alike, faint = _spread(seen), _faint(seen)
        if alike is None and faint:
            return faint
        if alike and not _may_come_back(observation, seen):
            return alike
        other = _blown_up(seen) or _gain(gains) or (_loss(seen, first) if is_young else None)
        return other or (alike and replace(alike, severity=Severity.INFO))


def _may_come_back(observation: Observation, seen: ModelPass) -> bool:
    """A lost signal grows where the gradient is not exactly zero."""
    if not seen.layers[-1].input_spread > ROUNDING:
        return False
    if seen.step < WAITS:
        # The updates of SGD are as faint as the signal.
        return not observation.follows_gradient
    return _left(seen) >= GROWN * _left(observation.first_pass)


def _left(seen: ModelPass) -> float:
    """Deviation from row to row of what enters the last layer."""
    return seen.layers[-1].input_std * seen.layers[-1].input_spread


def _spread(seen: ModelPass) -> Evidence | None:
    passes = [p for p in seen.layers if not math.isnan(p.input_spread)]
    if not _is_deep(passes) or passes[0].input_spread < DIFFERENT:
        return None
    last = passes[-1]
    if last.input_spread >= ALIKE:
        return None
    # Where it is lost: the layer before the first input that is alike.
    lost = next(
        i for i, p in enumerate(passes) if p.input_spread < DIFFERENT * passes[0].input_spread
    )
    return Evidence(
        observed=f"the rows of a batch differ by {passes[0].input_spread:.2g} of their size at the "
        f"input, and by {last.input_spread:.1e} at {last.layer}",
        limit=f"at least {ALIKE:g} at every layer",
        signal="activation",
        value=last.input_spread,
        began_at=passes[max(0, lost - 1)].layer,
        since_step=0,
    )


def _is_deep(passes: list[LayerPass]) -> bool:
    """A recurrent layer is as many as the sequence has steps."""
    return len(passes) >= 3 or any(p.kind in RECURRENT for p in passes[:-1])


def _faint(seen: ModelPass) -> Evidence | None:
    """Without a bias or a norm, a signal that shrinks from layer to layer still has its spread."""
    passes = [p for p in seen.layers if p.input_std > 0]
    if not _is_deep(passes):
        return None
    first, last = passes[0], passes[-1]
    least = FAINT if len(passes) >= 3 else BEHIND_GATES
    if last.input_std >= least * min(1.0, first.input_std):
        return None
    return Evidence(
        observed=f"the standard deviation of what enters {last.layer} is {last.input_std:.1e}, and "
        f"that of the input is {first.input_std:.2g}",
        limit=f"at least {least:g}, and {least:g} of the input's",
        signal="activation",
        value=last.input_std,
        began_at=first.layer,
        since_step=0,
    )


def _blown_up(seen: ModelPass) -> Evidence | None:
    """The signal grows from layer to layer; the first gradients grow as much."""
    passes = [p for p in seen.layers if p.input_std > 0]
    if not _is_deep(passes):
        return None
    first, last = passes[0], passes[-1]
    if last.input_std <= BLOWN_UP * max(1.0, first.input_std):
        return None
    return Evidence(
        observed=f"the standard deviation of what enters {last.layer} is {last.input_std:.2g}, and "
        f"that of the input is {first.input_std:.2g}",
        limit=f"at most {BLOWN_UP:g}, and {BLOWN_UP:g} times the input's",
        signal="activation",
        value=last.input_std,
        began_at=first.layer,
        since_step=0,
    )


def _gains_at_birth(observation: Observation) -> dict[str, float]:
    """Layer -> std(weights) x sqrt(inputs) of its largest matrix.

    An adapter has a matrix that starts at zero beside another one; what it adapts is frozen, and
    counts too.
    """
    gains: dict[str, float] = {}
    for tensor in observation.tensors:
        if math.isfinite(tensor.gain):
            gains[tensor.layer] = max(tensor.gain, gains.get(tensor.layer, 0.0))
    return gains


def _gains_now(observation: Observation) -> dict[str, float]:
    norms = {row.name: row.weight_norm for row in observation.last_gradients.rows}
    return {
        t.layer: norms[t.name] / math.sqrt(t.elements) * t.gain / t.std
        for t in observation.tensors
        if t.std > 0 and math.isfinite(t.gain) and math.isfinite(norms.get(t.name, math.nan))
    }


def _gain(gains: dict[str, float]) -> Evidence | None:
    if len(gains) < 2:
        return None
    middle = median(gains.values())
    if SMALL_GAIN <= middle <= LARGE_GAIN:
        return None
    worst = (min if middle < SMALL_GAIN else max)(gains, key=lambda name: gains[name])
    return Evidence(
        observed=f"the median of std(weights) x sqrt(inputs) is {middle:.2g}, in {worst} "
        f"{gains[worst]:.2g}",
        limit=f"from {SMALL_GAIN:g} to {LARGE_GAIN:g}",
        signal="weights",
        value=middle,
        began_at=worst,
        since_step=0,
    )


def _loss(seen: ModelPass, first: float) -> Evidence | None:
    chance = seen.guessing_loss
    if not math.isnan(seen.cross_entropy):
        first = min(first, seen.cross_entropy)  # without a penalty that is added to it
    if math.isnan(chance) or first < ABOVE_CHANCE * chance:
        return None
    return Evidence(
        observed=f"the first loss is {first:.3g}, and that of guessing is {chance:.3g}",
        limit=f"at most {ABOVE_CHANCE:g} times that of guessing",
        signal="loss",
        value=first / chance,
        since_step=0,
        severity=None if first >= FAR_ABOVE_CHANCE * chance else Severity.INFO,
    )
