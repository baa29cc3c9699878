"""Transparent rules, the cheapest adaptation first. The default policy.

    no finding that the run lacks capacity -> nothing, with the findings that are open
    capacity   the diagnosis says so
               -> more units in the hidden layer before the layer that it names, where only an
                  activation is between the two layers; otherwise at the layers that look like the
                  bottleneck add_efficiency, then add_ffn, then add_attention, then add_moe

Every other fault is answered by a remedy, which adds nothing to the model. A loss that is flat is
no evidence for capacity: on healthy runs most flat stretches end by themselves.

These rules choose the place and the kind. How sure it is that it helps is told by cases, see
:mod:`esper.policy.confidence`.
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
    Finding,
    LayerHistory,
    LayerInfo,
    Reason,
    RunSnapshot,
    Signal,
)
from esper.contracts.spans import hidden_layers, why_no_span
from esper.health import Features
from esper.health.features import MIN_LOSS_SAMPLES
from esper.policy.base import Proposals

CAPACITY = "capacity"  # slug of the finding that grafts answer
WIDER = "widen_hidden"  # slug of the blueprint that it answers first
LADDER = (AdaptationType.ADD_FFN, AdaptationType.ADD_ATTENTION, AdaptationType.ADD_MOE)

BOTTLENECK = 0.3
MAX_LAYERS_PROPOSED = 3
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
    """See the module's docstring for the rules."""

    name = "heuristic-3"

    @np.errstate(all="ignore")  # NaN is valid data here
    def propose(
        self,
        snapshot: RunSnapshot,
        features: Features,
        rng: np.random.Generator | None = None,
    ) -> Proposals:
        """Decisions, best first; ``rng`` is not used."""
        finding = next((f for f in snapshot.findings if f.slug == CAPACITY), None)
        if finding is None:
            return Proposals(reasons=tuple(_no_capacity_finding(snapshot, features)))
        against = _not_yet(snapshot, features)
        return Proposals(reasons=(against,)) if against else capacity(snapshot, features, finding)


def capacity(snapshot: RunSnapshot, features: Features, finding: Finding) -> Proposals:
    """The run lacks capacity: add it at the bottleneck, the cheapest kind first.

    Args:
        finding: the diagnosis that says so; its layer comes first.
    """
    wider = _wider(snapshot, features, finding)
    if wider is not None:
        return Proposals((wider,))
    found = bottlenecks(snapshot, features)
    named = np.array([layer.name == finding.layer for layer in features.layers], dtype=bool)
    named &= found.score >= 0
    order = [int(row) for row in np.lexsort((-found.score, ~named))]
    rows = [row for row in order if named[row] or found.score[row] >= BOTTLENECK]
    if not rows:
        return Proposals(reasons=("The run lacks capacity, but no layer is the bottleneck.",))
    steps = [
        (row, kind)
        for row in rows[:MAX_LAYERS_PROPOSED]
        for kind in _rungs(features, features.layers[row])
    ]
    # All first rungs before any second: the cheap adaptation of the next layer costs less.
    steps.sort(key=lambda step: _rung_order(features, step[1]))
    decisions = tuple(_room(found, finding, row, kind, features) for row, kind in steps)
    if not decisions:
        return Proposals(
            reasons=("Every bottleneck has all blueprints that these rules know already.",)
        )
    return Proposals(decisions)


@dataclass(frozen=True, slots=True)
class Wish:
    """A change that would answer a finding, for a plan of several.

    Attributes:
        decision: the change, its blueprint still open.
        weight: 0..1, how much its place matters against the place that the finding names.
    """

    decision: AdaptationDecision
    weight: float


def wishes(
    snapshot: RunSnapshot, features: Features, finding: Finding, *, most: int
) -> tuple[Wish, ...]:
    """All changes that would answer missing capacity, best first: every narrow hidden layer, and
    the cheapest kinds at the layers that look like the bottleneck.

    Args:
        most: wishes.
    """
    found = [*_every_wider(snapshot, features, finding)]
    scores = bottlenecks(snapshot, features)
    for row, layer in enumerate(features.layers):
        named, score = layer.name == finding.layer, float(scores.score[row])
        if score < 0 or (score < BOTTLENECK and not named):
            continue
        weight = 1.0 if named else min(1.0, score)
        found += [
            Wish(_room(scores, finding, row, kind, features), weight)
            for kind in _rungs(features, layer)
        ]
    found.sort(
        key=lambda wish: (-wish.weight, wish.decision.layer_name, wish.decision.adaptation_type)
    )
    return tuple(found[:most])


def _every_wider(snapshot: RunSnapshot, features: Features, finding: Finding) -> Iterable[Wish]:
    """A span at each hidden layer; the narrower, the more it matters."""
    hidden = hidden_layers(features.layers)
    narrowest = min((since.features_out for since, _ in hidden), default=0)
    for since, layer in hidden:
        decision = _widened(snapshot, features, finding, since, layer)
        if decision is not None and since.features_out > 0:
            named = layer.name == finding.layer
            yield Wish(decision, 1.0 if named else 0.8 * narrowest / since.features_out)


def _wider(
    snapshot: RunSnapshot, features: Features, finding: Finding
) -> AdaptationDecision | None:
    """More units between the layer that the finding names and the one that feeds it alone."""
    layer = snapshot.layer(finding.layer)
    if layer is None:
        return None
    hidden = hidden_layers(features.layers)
    since = next((one for one, other in hidden if other.name == layer.name), None)
    return None if since is None else _widened(snapshot, features, finding, since, layer)


def _widened(
    snapshot: RunSnapshot,
    features: Features,
    finding: Finding,
    since: LayerInfo,
    layer: LayerInfo,
) -> AdaptationDecision | None:
    history = snapshot.history.get(layer.name, LayerHistory())
    if WIDER in history.grafts or history.last_rolled_back or why_no_span(since, layer):
        return None
    units = f"{since.features_out} units between {since.name} and {layer.name}"
    return AdaptationDecision(
        layer_name=layer.name,
        adaptation_type=AdaptationType.ADD_FFN,
        confidence=math.nan,
        urgency=round(_urgency(features, layer.name), 4),
        reasons=(
            Reason(CAPACITY, features.loss.plateau_score, 0.5, finding.observed),
            Reason("narrow", float(since.features_out), 0.5, units),
        ),
        since=since.name,
    )


def _not_yet(snapshot: RunSnapshot, features: Features) -> str:
    """Why the effect of an earlier adaptation must be seen first; empty: it has been."""
    if snapshot.in_flight > 0:
        return "Another adaptation is in progress; measure its effect before adding capacity."
    if snapshot.last_adaptation_step >= 0 and not math.isfinite(features.loss.plateau_score):
        samples = features.loss.samples
        return f"{samples} samples of the loss do not show the effect of the last adaptation yet."
    return ""


def _no_capacity_finding(snapshot: RunSnapshot, features: Features) -> Iterable[str]:
    text = "No open finding says that the run lacks capacity, so nothing is grafted"
    named = sorted({finding.slug for finding in snapshot.findings})
    yield f"{text}; open findings: {', '.join(named)}." if named else f"{text}."
    if features.loss.samples < MIN_LOSS_SAMPLES:
        yield f"{features.loss.samples} samples of the loss do not show its trend in the noise yet."


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
    found: Bottlenecks,
    finding: Finding,
    row: int,
    kind: AdaptationType,
    features: Features,
) -> AdaptationDecision:
    layer = features.layers[row].name
    return AdaptationDecision(
        layer_name=layer,
        adaptation_type=kind,
        confidence=math.nan,
        urgency=round(_urgency(features, layer), 4),
        reasons=(
            Reason(CAPACITY, features.loss.plateau_score, 0.5, finding.observed),
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
