"""Transparent rules, the cheapest remedy first. The default policy.

    unstable     loss jumps, or a layer's updates are huge while the loss does not fall
                 -> add_diagnostic (selection then prefers blueprints that limit the gradient)
    unclear      a layer looks unhealthy and its activations are unknown -> add_diagnostic
    dead units   half of a layer's units are dead and the loss is flat -> add_ffn beside them
    plateau      the loss is flat and not near zero, and a layer is the bottleneck
                 -> add_efficiency, then add_ffn, then add_attention, then add_moe
    else         nothing, with the numbers that say so

Confidence is the rule's prior chance to be kept times the strength of its signals. The priors are
assumptions that count as ten cases; :func:`esper.policy.confidence.posterior_confidence` replaces
them with experience from closed cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.contracts import (
    AdaptationDecision,
    AdaptationType,
    LayerHistory,
    LayerInfo,
    Reason,
    RunSnapshot,
    Signal,
)
from esper.health import Features
from esper.policy.base import Proposals

PRIORS: dict[str, float] = {
    "unclear": 0.95,
    "unstable": 0.88,
    "plateau/add_efficiency": 0.88,
    "plateau/add_ffn": 0.74,
    "plateau/add_attention": 0.70,
    "plateau/add_moe": 0.66,
    "dead": 0.68,
}
LADDER = (AdaptationType.ADD_FFN, AdaptationType.ADD_ATTENTION, AdaptationType.ADD_MOE)
# Share of the prior that does not depend on how strong the signals are.
FIRM_SHARE = 0.8
AFTER_ROLLBACK = 0.85  # factor of the confidence on a layer with an earlier rollback

SICK = 0.5
DEAD_SHARE = 0.5
PLATEAU = 0.8
YOUNG_STEPS = 500
MIN_HEADROOM = 0.05  # below 5 % of the first losses, little can be gained
NOTHING_LEARNT = 0.97
BOTTLENECK = 0.3
MAX_LAYERS_PROPOSED = 3
_LOOKED_AT = (Signal.ACT_STD, Signal.DEAD_FRACTION, Signal.SATURATION)
# Weight of each sign of a bottleneck.
SIGNS: dict[str, float] = {"stable_rank": 0.4, "grad_share": 0.35, "narrow": 0.25}


@dataclass(frozen=True, slots=True, eq=False)
class Bottlenecks:
    """How much each layer looks like the bottleneck.

    Shape legend: L layers.

    Attributes:
        score: float64 [L], 0..1; -1 for a layer that is not a candidate.
        signs: float64 [L] for each sign, 0..1, NaN unknown.
        coverage: float64 [L], weight of the signs that are known, 0..1.
    """

    score: NDArray[np.float64]
    signs: dict[str, NDArray[np.float64]]
    coverage: NDArray[np.float64]


class HeuristicPolicy:
    """See the module's docstring for the rules.

    Args:
        growth_only: leave out the rules that add a diagnostic, because the run's diagnosis watches
            what they would watch, and its remedies limit gradients without a graft.
    """

    name = "heuristic-1"

    def __init__(self, *, growth_only: bool = False) -> None:
        growth = (dead_units, plateau)
        self._rules = growth if growth_only else (unstable, unclear, *growth)

    @np.errstate(all="ignore")  # NaN is valid data here
    def propose(
        self,
        snapshot: RunSnapshot,
        features: Features,
        rng: np.random.Generator | None = None,
    ) -> Proposals:
        """Decisions in the order of the rules; ``rng`` is not used."""
        decisions: list[AdaptationDecision] = []
        reasons: list[str] = []
        for rule in self._rules:
            found = rule(snapshot, features)
            decisions.extend(found.decisions)
            reasons.extend(found.reasons)
        return Proposals(tuple(_once(decisions)), tuple(reasons))


def unstable(snapshot: RunSnapshot, features: Features) -> Proposals:
    """The loss jumps or updates are far too large: limit the layer's gradient."""
    strength_L = np.where(_changeable(snapshot, features), features.unstable, 0.0)
    if not strength_L.size or strength_L.max() <= 0:
        return Proposals(reasons=(f"Nothing is unstable: {_spike_text(features)}.",))
    row = int(np.argmax(strength_L))
    layer, strength = features.layers[row], float(strength_L[row])
    ratio = features.value(layer.name, Signal.UPDATE_RATIO)
    return Proposals(
        (
            _decision(
                "unstable",
                layer.name,
                AdaptationType.ADD_DIAGNOSTIC,
                snapshot,
                strength=strength,
                urgency=0.5 + 0.5 * strength,
                reasons=(
                    Reason("loss_spike", features.loss.spike_score, 0.5, _spike_text(features)),
                    Reason(
                        str(Signal.UPDATE_RATIO),
                        ratio,
                        0.5,
                        f"the weights change by {ratio:.1e} per step; 1e-3 is usual",
                    ),
                ),
            ),
        )
    )


def unclear(snapshot: RunSnapshot, features: Features) -> Proposals:
    """A layer looks unhealthy and its activations are unknown: measure them, without risk."""
    health_L = features.column(Signal.HEALTH)
    decisions = []
    for row in np.argsort(health_L, kind="stable"):
        layer, health = features.layers[row], float(health_L[row])
        if not health < SICK:
            break
        if _known(features, layer.name) or not _may_change(layer, snapshot):
            continue
        if AdaptationType.ADD_DIAGNOSTIC in features.remedies.get(layer.name, frozenset()):
            continue
        decisions.append(
            _decision(
                "unclear",
                layer.name,
                AdaptationType.ADD_DIAGNOSTIC,
                snapshot,
                strength=(SICK - health) / SICK,
                urgency=_urgency(features, layer.name),
                reasons=(
                    Reason(str(Signal.HEALTH), health, 0.6, f"health {health:.2f} of 1"),
                    Reason(str(Signal.ACT_STD), math.nan, 0.4, "its activations are unknown"),
                ),
            )
        )
    return Proposals(tuple(decisions[:MAX_LAYERS_PROPOSED]), _health_reason(health_L))


def dead_units(snapshot: RunSnapshot, features: Features) -> Proposals:
    """Units that are dead stay dead; a path beside them carries gradient at once."""
    flat = features.loss.plateau_score
    dead_L = features.column(Signal.DEAD_FRACTION)
    worst = _argmax_known(dead_L)
    if worst is None or not dead_L[worst] >= DEAD_SHARE or not flat >= 0.5:
        return Proposals()
    layer, share = features.layers[worst], float(dead_L[worst])
    carried = features.remedies.get(layer.name, frozenset())
    if not _may_change(layer, snapshot) or AdaptationType.ADD_FFN in carried:
        return Proposals(
            reasons=(f"{layer.name} has {share:.0%} dead units, but an adaptation of it exists.",)
        )
    return Proposals(
        (
            _decision(
                "dead",
                layer.name,
                AdaptationType.ADD_FFN,
                snapshot,
                strength=(share - DEAD_SHARE) / (1 - DEAD_SHARE),
                urgency=_urgency(features, layer.name),
                reasons=(
                    Reason(str(Signal.DEAD_FRACTION), share, 0.7, f"{share:.0%} of units dead"),
                    Reason("loss_plateau", flat, 0.3, _plateau_text(features)),
                ),
            ),
        )
    )


def plateau(snapshot: RunSnapshot, features: Features) -> Proposals:
    """The loss is flat well above zero: add capacity at the bottleneck, cheapest kind first."""
    against = _against_plateau(snapshot, features)
    if against:
        return Proposals(reasons=(against,))
    found = bottlenecks(snapshot, features)
    order = [int(i) for i in np.argsort(-found.score, kind="stable")]
    rows = [row for row in order if found.score[row] >= BOTTLENECK][:MAX_LAYERS_PROPOSED]
    if not rows:
        return Proposals(reasons=("The loss is flat, but no layer stands out as bottleneck.",))
    steps = [(row, kind) for row in rows for kind in _rungs(features, features.layers[row])]
    # All first rungs before any second: the cheap remedy on the next layer costs less.
    steps.sort(key=lambda step: _rung_order(features, step[1]))
    decisions = tuple(_room(snapshot, features, found, row, kind) for row, kind in steps)
    if not decisions:
        return Proposals(
            reasons=("Every bottleneck has all blueprints that these rules know already.",)
        )
    return Proposals(decisions)


def bottlenecks(snapshot: RunSnapshot, features: Features) -> Bottlenecks:
    """Scores every layer; a healthy layer whose capacity is used scores high."""
    candidate_L = _changeable(snapshot, features)
    signs = {
        "stable_rank": np.clip(2.0 * features.column(Signal.STABLE_RANK), 0.0, 1.0),
        "grad_share": _gradient_sign(features.column(Signal.GRAD_NORM), candidate_L),
        "narrow": _narrow_sign(features.layers, candidate_L),
    }
    weights = np.array([SIGNS[name] for name in signs])[:, None]
    values = np.array([np.asarray(sign, dtype=np.float64) for sign in signs.values()])
    known = ~np.isnan(values)
    coverage_L = (weights * known).sum(axis=0)
    mean_L = (weights * np.where(known, values, 0.0)).sum(axis=0) / np.maximum(coverage_L, 1e-12)
    health_L = np.nan_to_num(features.column(Signal.HEALTH).astype(np.float64), nan=0.5)
    score_L = mean_L * (0.5 + 0.5 * health_L) * _after_rollback(snapshot, features)
    return Bottlenecks(
        score=np.where(candidate_L & (coverage_L > 0), score_L, -1.0),
        signs=dict(zip(signs, values, strict=True)),
        coverage=coverage_L,
    )


def _against_plateau(snapshot: RunSnapshot, features: Features) -> str:
    """Why the loss needs no adaptation; empty if it does."""
    loss = features.loss
    if not math.isfinite(loss.plateau_score):
        return f"{loss.samples} samples of the loss do not show its trend in the noise yet."
    if loss.plateau_score < PLATEAU:
        return f"The loss still falls, or it is not certain to be flat ({_plateau_text(features)})."
    if snapshot.step < YOUNG_STEPS:
        return f"At step {snapshot.step} a flat loss is often a saddle point; the run leaves it."
    if not loss.headroom >= MIN_HEADROOM:
        return f"The loss is at {loss.headroom:.1%} of its first value; little can be gained."
    if loss.from_start and loss.headroom > NOTHING_LEARNT:
        return (
            "The run has learnt nothing yet. Check learning rate and data before adding capacity."
        )
    if snapshot.in_flight > 0:
        return "Another adaptation is in progress; measure its effect before adding capacity."
    return ""


def _rungs(features: Features, layer: LayerInfo) -> Iterable[AdaptationType]:
    """The adaptations allowed for this layer, next rung first."""
    carried = features.remedies.get(layer.name, frozenset())
    if AdaptationType.ADD_EFFICIENCY not in carried:
        yield AdaptationType.ADD_EFFICIENCY
    for kind in LADDER:
        if kind in carried or (kind is AdaptationType.ADD_ATTENTION and not layer.has_sequence):
            continue
        yield kind
        return


def _rung_order(features: Features, kind: AdaptationType) -> int:
    """Efficiency first; last once the run has one and its loss is still flat."""
    tried = any(AdaptationType.ADD_EFFICIENCY in kinds for kinds in features.remedies.values())
    cheap = kind is AdaptationType.ADD_EFFICIENCY
    return int(cheap) if tried else int(not cheap)


def _room(
    snapshot: RunSnapshot, features: Features, found: Bottlenecks, row: int, kind: AdaptationType
) -> AdaptationDecision:
    layer, score = features.layers[row], float(found.score[row])
    flat = (features.loss.plateau_score - PLATEAU) / (1 - PLATEAU)
    return _decision(
        f"plateau/{kind}",
        layer.name,
        kind,
        snapshot,
        strength=(0.5 * flat + 0.5 * min(1.0, score / 0.6)) * float(found.coverage[row]),
        urgency=0.3 * flat,
        reasons=(
            Reason("loss_plateau", features.loss.plateau_score, 0.5, _plateau_text(features)),
            *_sign_reasons(found, row),
        ),
    )


def _sign_reasons(found: Bottlenecks, row: int) -> Iterable[Reason]:
    texts = {
        "stable_rank": "the share of its possible rank that the layer's weight uses",
        "grad_share": "the share of the run's gradient at this layer",
        "narrow": "how narrow the layer is compared with the widest one",
    }
    for name, weight in SIGNS.items():
        value = float(found.signs[name][row])
        known = math.isfinite(value)
        text = texts[name] if known else f"{texts[name]}: unknown"
        yield Reason(name, value, 0.5 * weight if known else 0.0, text)


def _decision(
    rule: str,
    layer: str,
    kind: AdaptationType,
    snapshot: RunSnapshot,
    *,
    strength: float,
    urgency: float,
    reasons: tuple[Reason, ...],
) -> AdaptationDecision:
    strength = min(1.0, max(0.0, strength)) if math.isfinite(strength) else 0.0
    confidence = PRIORS[rule] * (FIRM_SHARE + (1 - FIRM_SHARE) * strength)
    if snapshot.history.get(layer, LayerHistory()).last_rolled_back:
        confidence *= AFTER_ROLLBACK
    return AdaptationDecision(
        layer_name=layer,
        adaptation_type=kind,
        confidence=round(confidence, 4),
        urgency=round(min(1.0, max(0.0, urgency)), 4),
        reasons=reasons,
    )


def _may_change(layer: LayerInfo, snapshot: RunSnapshot) -> bool:
    busy = snapshot.history.get(layer.name, LayerHistory()).in_flight
    return layer.graftable and layer.trainable and not busy


def _changeable(snapshot: RunSnapshot, features: Features) -> NDArray[np.bool_]:
    """bool [L]: layers that may be changed and have weights."""
    busy = {name for name, history in snapshot.history.items() if history.in_flight}
    return np.array(
        [
            layer.graftable and layer.trainable and layer.parameters > 0 and layer.name not in busy
            for layer in features.layers
        ],
        dtype=bool,
    )


def _known(features: Features, layer: str) -> bool:
    return any(not math.isnan(features.value(layer, signal)) for signal in _LOOKED_AT)


def _argmax_known(values_L: NDArray[np.float32]) -> int | None:
    known = np.where(np.isfinite(values_L), values_L, -np.inf)
    return int(np.argmax(known)) if np.isfinite(known).any() else None


def _gradient_sign(
    norm_L: NDArray[np.float32], candidate_L: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """0.5 at the median of the candidates, 0 a decade below, 1 a decade above."""
    usable = candidate_L & np.isfinite(norm_L) & (norm_L > 0)
    sign = np.full(len(norm_L), np.nan)
    if usable.any():
        log_norm = np.log10(norm_L[usable].astype(np.float64))
        sign[usable] = np.clip(0.5 + 0.5 * (log_norm - np.median(log_norm)), 0.0, 1.0)
    return sign


def _narrow_sign(
    layers: tuple[LayerInfo, ...], candidate_L: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """1 - width / widest, of the layers whose width is known; the input side counts too."""
    width = np.array([min(layer.features_in, layer.features_out) for layer in layers], dtype=float)
    usable = candidate_L & (width > 0)
    sign = np.full(len(layers), np.nan)
    if usable.any():
        sign[usable] = 1.0 - width[usable] / width[usable].max()
    return sign


def _after_rollback(snapshot: RunSnapshot, features: Features) -> NDArray[np.float64]:
    """Half for a layer whose last graft was rolled back: other layers come first."""
    factor = np.ones(len(features.layers))
    for name, history in snapshot.history.items():
        if history.last_rolled_back and name in features.index:
            factor[features.index[name]] = 0.5
    return factor


def _urgency(features: Features, layer: str) -> float:
    """How fast the layer's health falls."""
    trend = features.trend_of(layer, Signal.HEALTH)
    return min(1.0, max(0.0, -trend)) if math.isfinite(trend) else 0.0


def _once(decisions: Iterable[AdaptationDecision]) -> Iterable[AdaptationDecision]:
    seen: set[tuple[str, AdaptationType]] = set()
    for decision in decisions:
        key = (decision.layer_name, decision.adaptation_type)
        if key not in seen:
            seen.add(key)
            yield decision


def _spike_text(features: Features) -> str:
    spike = features.loss.spike_score
    if features.loss.non_finite:
        return f"{features.loss.non_finite} recent losses are not finite"
    if not math.isfinite(spike):
        return "too few samples of the loss to see a jump"
    return f"the newest losses lie {spike:.1f} times the noise above the trend"


def _plateau_text(features: Features) -> str:
    loss = features.loss
    return (
        f"the loss goes like step^{-loss.exponent:.2f} ± {loss.exponent_error:.2f}: "
        f"flat with probability {loss.plateau_score:.2f}"
    )


def _health_reason(health_L: NDArray[np.float32]) -> tuple[str, ...]:
    worst = np.nanmin(health_L) if np.isfinite(health_L).any() else math.nan
    if math.isnan(worst):
        return ("The health of no layer is known yet.",)
    return (f"The least healthy layer has {worst:.2f} of 1.",)
