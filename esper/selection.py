"""Selects a blueprint and its size: scores all candidates, and gives a "why not" for the others.

    score = gain - rent - memory - latency - stability - risk - redundancy - parts + fit

Shape legend: N sizes of one blueprint at one layer.

The costs of a blueprint at a layer follow from the layer's shape, so they are computed once per
shape and cached; a selection is then a few array operations per blueprint.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from esper.contracts import (
    SMALLEST_BUDGETED,
    AdaptationType,
    BlueprintCategory,
    Candidate,
    CostForecast,
    Experience,
    GraftKind,
    LayerHistory,
    LayerInfo,
    Risk,
    RunSnapshot,
    SafetyPolicy,
    Selection,
    WhyNot,
    cost_limits,
    risk_rank,
)
from esper.contracts.variants import Factors, Variant
from esper.exceptions import ConfigurationError, IncompatibleLayerError, UnknownBlueprintError
from esper.health import Features

Doubles = NDArray[np.float64]

MAX_TABLES = 4_096
WIDE_ENOUGH = 32  # units of a hidden layer that is no bottleneck of a small model
PRIOR_CASES = 4.0  # weight of the prior against closed cases
PRIOR_KEPT = 0.6
MEMORY_WEIGHT, LATENCY_WEIGHT, RENT_WEIGHT = 0.2, 0.2, 0.3
REWARD_SCALE = 5.0  # a mean reward of 10 % of the loss counts for half a point
# Cost of each further part of a composition: after a failure, the responsible part is unknown. So a
# composition is proposed if it did better than its parts, not because it is larger.
PARTS_WEIGHT = 0.05
RISK_WEIGHT, REDUNDANCY_WEIGHT, FIT_WEIGHT = 0.08, 0.1, 0.3
# Cost for stability of a graft of this kind, at any class of risk.
INSTABILITY: Mapping[GraftKind, float] = {
    GraftKind.OBSERVE: 0.0,
    GraftKind.WRAP: 0.02,
    GraftKind.SCALE: 0.02,
    GraftKind.PARALLEL: 0.04,
    GraftKind.DISTRIBUTED: 0.06,
    GraftKind.ASSEMBLY: 0.08,
    GraftKind.REPLACE: 0.12,
}
# An unknown latency is bounded from above by the speed of the slowest supported machine. The bound
# is used only if it is within the limit; the real latency is measured before dispatch.
FLOOR_FLOPS_PER_SECOND: Mapping[str, float] = {"cpu": 2e9, "cuda": 1e12}
CALL_OVERHEAD_MS = 0.2


class SelectableBlueprint(Protocol):
    """What selection needs of a blueprint; ``esper.blueprints.Blueprint`` implements it."""

    @property
    def slug(self) -> str: ...
    @property
    def category(self) -> BlueprintCategory: ...
    @property
    def adaptation_type(self) -> AdaptationType: ...
    @property
    def risk(self) -> Risk: ...
    @property
    def kind(self) -> GraftKind: ...
    @property
    def conflicts(self) -> frozenset[str]: ...
    @property
    def requires(self) -> frozenset[str]: ...
    @property
    def parts(self) -> int: ...

    def refusal(self, layer: LayerInfo) -> str:
        """Empty if it fits the layer, or the span, otherwise a sentence for a person."""

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        """All candidate configurations, smallest first."""

    def forecast(self, layer: LayerInfo, config: dict[str, Any]) -> CostForecast:
        """Cost computed from shapes."""

    def varied(self, layer: LayerInfo, factors: Factors) -> dict[str, Any]:
        """The configuration of a variant; raises where it has none at this layer."""


def _none() -> Doubles:
    return np.empty(0)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """All sizes of one blueprint at one shape of layer; ``refusal`` if it does not fit.

    ``effect_N`` is the gain of each size, ``bound_N`` its latency or an upper bound of it.
    """

    refusal: str
    configs: tuple[dict[str, Any], ...] = ()
    forecasts: tuple[CostForecast, ...] = ()
    parameters_N: Doubles = field(default_factory=_none)
    memory_N: Doubles = field(default_factory=_none)
    latency_N: Doubles = field(default_factory=_none)
    effect_N: Doubles = field(default_factory=_none)
    bound_N: Doubles = field(
        default_factory=_none
    )  # if the latency is unknown, otherwise the latency
    most: tuple[float, float, float] = (0.0, 0.0, 0.0)  # parameters, memory, bound; NaN if one is
    # By size, of those that are the size of an admitted variant.
    variants: Mapping[int, Variant] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    """One blueprint at its best size for the layer."""

    blueprint: SelectableBlueprint
    table: _Table
    size: int
    score: float
    terms: dict[str, float]
    latency_ms: float


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """The layer of a possible graft, and the limits there."""

    layer: LayerInfo
    history: LayerHistory
    types: frozenset[AdaptationType]  # of the layer's present grafts
    instability: float
    max_memory_mib: float
    max_latency_ms: float
    max_parameters: float
    model_parameters: int


class BlueprintSelector:
    """Selects from a catalogue. The catalogue's order does not matter."""

    def __init__(self, catalog: Iterable[SelectableBlueprint]) -> None:
        self._blueprints = {b.slug: b for b in sorted(catalog, key=lambda b: b.slug)}
        self._tables: OrderedDict[tuple[Any, ...], _Table] = OrderedDict()

    @property
    def types(self) -> dict[str, AdaptationType]:
        """Adaptation type of each blueprint."""
        return {slug: b.adaptation_type for slug, b in self._blueprints.items()}

    def blueprint(self, slug: str) -> SelectableBlueprint:
        """Raises ``UnknownBlueprintError`` for a slug that is not in the catalogue."""
        try:
            return self._blueprints[slug]
        except KeyError:
            raise UnknownBlueprintError(f"no blueprint has the slug {slug!r}", slug=slug) from None

    def category_cases(self, slug: str, experience: Mapping[str, Experience]) -> int:
        """Closed cases of all blueprints of this one's category."""
        category = self.blueprint(slug).category
        return sum(
            cases.cases
            for other, cases in experience.items()
            if other in self._blueprints and self._blueprints[other].category is category
        )

    def select(
        self,
        layer: LayerInfo,
        adaptation_type: AdaptationType,
        snapshot: RunSnapshot,
        policy: SafetyPolicy,
        *,
        extra_limits: Mapping[str, float] | None = None,
        features: Features | None = None,
    ) -> Selection:
        """The best blueprint for a layer, and why not each of the others.

        Args:
            layer: the target of the graft.
            adaptation_type: only blueprints of this type are candidates.
            snapshot: the layer's history, experience, disabled blueprints and the run's size.
            policy: limits on memory, latency and added parameters.
            extra_limits: stricter limits of the caller, ``max_memory_mb`` and ``max_latency_ms``.
            features: if given, unstable layers prefer blueprints that limit the gradient.

        Raises:
            ConfigurationError: ``extra_limits`` has an unknown name or a non-finite number.
        """
        place = self._place(layer, snapshot, policy, extra_limits or {}, features)
        refused: dict[str, str] = {}
        found: dict[str, _Scored] = {}
        for slug, blueprint in self._blueprints.items():
            answer = self._scored(blueprint, adaptation_type, place, snapshot)
            if isinstance(answer, str):
                refused[slug] = answer
            else:
                found[slug] = answer
        best = min(found.values(), key=_rank, default=None)
        for slug, scored in found.items():
            if best is not None and scored is not best:
                refused[slug] = _beaten(scored, best)
        return Selection(
            best=_candidate(best) if best else None,
            why_not=tuple(WhyNot(slug, refused[slug]) for slug in sorted(refused)),
        )

    def options(
        self,
        layer: LayerInfo,
        adaptation_type: AdaptationType,
        snapshot: RunSnapshot,
        policy: SafetyPolicy,
        *,
        features: Features | None = None,
        most: int = 4,
    ) -> tuple[Candidate, ...]:
        """What several changes of one run are chosen from: the best blueprints, each in some sizes.

        Args:
            most: blueprints, best first.

        Returns:
            For each its best size, and of the sizes below that half, a quarter and the smallest:
            the largest that fits alone may leave no room for another layer.
        """
        place = self._place(layer, snapshot, policy, {}, features)
        found = []
        for blueprint in self._blueprints.values():
            scored = self._scored(blueprint, adaptation_type, place, snapshot)
            if not isinstance(scored, str):
                found.append(scored)
        found.sort(key=_rank)
        return tuple(
            _candidate(_resized(scored, size, place, snapshot))
            for scored in found[:most]
            for size in sorted({scored.size, scored.size // 2, scored.size // 4, 0}, reverse=True)
        )

    def _place(
        self,
        layer: LayerInfo,
        snapshot: RunSnapshot,
        policy: SafetyPolicy,
        extra_limits: Mapping[str, float],
        features: Features | None,
    ) -> _Place:
        limits = cost_limits(extra_limits)
        history = snapshot.history.get(layer.name, LayerHistory())
        carried = (self._blueprints.get(slug) for slug in history.grafts)
        budget = policy.most_added_parameters(snapshot.model_parameters)
        return _Place(
            layer=layer,
            history=history,
            types=frozenset(b.adaptation_type for b in carried if b is not None),
            instability=features.instability(layer.name) if features else 0.0,
            max_memory_mib=min(policy.max_memory_mib, limits.get("max_memory_mib", math.inf)),
            max_latency_ms=min(policy.max_latency_ms, limits.get("max_latency_ms", math.inf)),
            max_parameters=budget - snapshot.added_parameters,
            model_parameters=max(snapshot.model_parameters, SMALLEST_BUDGETED),
        )

    def _scored(
        self,
        blueprint: SelectableBlueprint,
        adaptation_type: AdaptationType,
        place: _Place,
        snapshot: RunSnapshot,
    ) -> _Scored | str:
        """The blueprint at its best size, or why it is not a candidate."""
        if blueprint.adaptation_type is not adaptation_type:
            return f"It serves {_words(blueprint.adaptation_type)}, not {_words(adaptation_type)}."
        if blueprint.slug in snapshot.disabled_blueprints:
            return "A curator has disabled it."
        conflict = self._conflict(blueprint, place.history)
        if conflict:
            return conflict
        table = self._table(blueprint, place.layer, _variants(blueprint.slug, snapshot))
        if table.refusal:
            return table.refusal
        experience = snapshot.experience.get(blueprint.slug, Experience())
        return _best_size(blueprint, table, place, experience)

    def _conflict(self, blueprint: SelectableBlueprint, history: LayerHistory) -> str:
        if blueprint.slug in history.grafts:
            return "The layer has it already."
        for slug in history.grafts:
            other = self._blueprints.get(slug)
            if slug in blueprint.conflicts or (other and blueprint.slug in other.conflicts):
                return f"It conflicts with {slug}, which the layer has."
        if blueprint.requires and blueprint.requires.isdisjoint(history.grafts):
            return f"It needs {' or '.join(sorted(blueprint.requires))} on the layer first."
        return ""

    def _table(
        self, blueprint: SelectableBlueprint, layer: LayerInfo, variants: tuple[Variant, ...]
    ) -> _Table:
        told = tuple((one.uid, one.gain, one.trials) for one in variants)
        key = (blueprint.slug, _shape_key(layer), told)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = _tabulate(blueprint, layer, variants)
            if len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
        return table


def _shape_key(layer: LayerInfo) -> tuple[Any, ...]:
    """All of the layer but name and neighbours: equal layers share their tables."""
    return (
        layer.kind,
        layer.in_shape,
        layer.out_shape,
        layer.dtype,
        layer.parameters,
        layer.graftable,
        layer.reason,
        layer.features_in,
        layer.features_out,
        layer.channel_axis,
        layer.device,
        layer.calls,
        layer.trainable,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.head_width,
        layer.cached_channels,
        layer.looks_ahead,
        layer.sequence_axis,
        layer.activation,
        layer.recomputed,
        bool(layer.since),
    )


def _variants(slug: str, snapshot: RunSnapshot) -> tuple[Variant, ...]:
    """Those of one blueprint; most runs have none at all."""
    return tuple(one for one in snapshot.variants if one.blueprint == slug)


def _sizes(
    blueprint: SelectableBlueprint, layer: LayerInfo, variants: tuple[Variant, ...]
) -> tuple[tuple[dict[str, Any], ...], dict[int, Variant]]:
    """The blueprint's own sizes, then those of admitted variants that it has at this layer."""
    configs = list(blueprint.sizes(layer))
    found: dict[int, Variant] = {}
    for variant in variants:
        try:
            config = blueprint.varied(layer, variant.factors)
        except (ConfigurationError, IncompatibleLayerError):
            continue  # no such size here, for example above the largest that is allowed
        if config in configs:
            found.setdefault(configs.index(config), variant)
        else:
            found[len(configs)] = variant
            configs.append(config)
    return tuple(configs), found


def _tabulate(
    blueprint: SelectableBlueprint, layer: LayerInfo, variants: tuple[Variant, ...]
) -> _Table:
    refusal = blueprint.refusal(layer) if layer.graftable else layer.reason or "Not graftable."
    if refusal:
        return _Table(refusal)
    configs, learned = _sizes(blueprint, layer, variants)
    if not configs:
        return _Table("It has no valid size for this layer.")
    forecasts = tuple(blueprint.forecast(layer, config) for config in configs)
    costs = np.array(
        [[f.parameters, f.memory_mib, f.latency_ms, f.flops] for f in forecasts], dtype=np.float64
    ).T.copy()
    parameters_N, memory_N, latency_N, flops_N = costs
    rate = FLOOR_FLOPS_PER_SECOND.get(layer.device.split(":")[0], math.nan)
    unknown_N = np.isnan(latency_N)
    bound_N = np.where(unknown_N, CALL_OVERHEAD_MS + 1e3 * flops_N / rate, latency_N)
    return _Table(
        refusal="",
        configs=configs,
        forecasts=forecasts,
        parameters_N=parameters_N,
        memory_N=memory_N,
        latency_N=latency_N,
        effect_N=_size_effect(parameters_N, layer),
        bound_N=bound_N,
        most=(float(parameters_N.max()), float(memory_N.max()), float(bound_N.max())),
        variants=learned,
    )


def _best_size(
    blueprint: SelectableBlueprint, table: _Table, place: _Place, experience: Experience
) -> _Scored | str:
    latency_N = _latency(table, place)
    slowest = float(latency_N.max())  # NaN if one is unknown
    score_N = _size_score(table, latency_N, slowest, place, _gain(experience))
    fits_N = _fits(table, latency_N, slowest, place)
    if fits_N is not None:
        if not fits_N.any():
            return _too_large(table, latency_N, place)
        score_N = np.where(fits_N, score_N, -np.inf)
    size = int(np.argmax(score_N))  # among equals the first, which is the smallest
    latency_ms = float(latency_N[size])
    terms = _terms(blueprint, table, size, latency_ms, place, experience)
    return _Scored(blueprint, table, size, sum(terms.values()), terms, latency_ms)


def _resized(scored: _Scored, size: int, place: _Place, snapshot: RunSnapshot) -> _Scored:
    """The same blueprint at another of its sizes."""
    table, blueprint = scored.table, scored.blueprint
    latency_ms = float(_latency(table, place)[size])
    experience = snapshot.experience.get(blueprint.slug, Experience())
    terms = _terms(blueprint, table, size, latency_ms, place, experience)
    return _Scored(blueprint, table, size, sum(terms.values()), terms, latency_ms)


def _size_score(
    table: _Table, latency_N: Doubles, slowest: float, place: _Place, gain: float
) -> Doubles:
    """float64 [N]: the terms that differ between sizes; unknown costs count in full."""
    score_N: Doubles = gain * table.effect_N
    score_N -= _rent(place) * table.parameters_N
    for weight, cost_N, limit, largest in (
        (MEMORY_WEIGHT, table.memory_N, place.max_memory_mib, table.most[1]),
        (LATENCY_WEIGHT, latency_N, place.max_latency_ms, slowest),
    ):
        if limit <= 0:
            score_N -= weight
        elif math.isnan(largest):
            score_N -= weight * np.nan_to_num(cost_N / limit, nan=1.0)
        else:  # the usual case, ten times as fast
            score_N -= (weight / limit) * cost_N
    for size, variant in table.variants.items():
        score_N[size] += _shown(variant)
    return score_N


def _fits(
    table: _Table, latency_N: Doubles, slowest: float, place: _Place
) -> NDArray[np.bool_] | None:
    """bool [N], or None where even the largest size fits."""
    parameters, memory, _ = table.most
    small = parameters <= place.max_parameters and memory <= place.max_memory_mib
    if small and slowest <= place.max_latency_ms:
        return None
    return (
        (table.memory_N <= place.max_memory_mib)
        & ~(latency_N > place.max_latency_ms)
        & (table.parameters_N <= place.max_parameters)
    )


def _latency(table: _Table, place: _Place) -> Doubles:
    """Forecast latency; if unknown, an upper bound, if it is within the limit."""
    if table.most[2] <= place.max_latency_ms:
        return table.bound_N
    usable_N = np.isnan(table.latency_N) & (table.bound_N <= place.max_latency_ms)
    return np.where(usable_N, table.bound_N, table.latency_N)


def _terms(
    blueprint: SelectableBlueprint,
    table: _Table,
    size: int,
    latency_ms: float,
    place: _Place,
    experience: Experience,
) -> dict[str, float]:
    redundant = blueprint.adaptation_type in place.types
    variant = table.variants.get(size)
    trials = {} if variant is None else {"trials": _shown(variant)}
    return trials | {
        "gain": _gain(experience) * float(table.effect_N[size]),
        "reward": _learned_reward(experience),
        "rent": -_rent(place) * float(table.parameters_N[size]),
        "memory": -MEMORY_WEIGHT * _share(float(table.memory_N[size]), place.max_memory_mib),
        "latency": -LATENCY_WEIGHT * _share(latency_ms, place.max_latency_ms),
        "stability": -INSTABILITY[blueprint.kind],
        "risk": -RISK_WEIGHT * risk_rank(blueprint.risk),
        "redundancy": -REDUNDANCY_WEIGHT if redundant else 0.0,
        "parts": -PARTS_WEIGHT * (blueprint.parts - 1),
        "fit": _fit(blueprint, place.instability),
    }


def _rent(place: _Place) -> float:
    """The term for added parameters."""
    return RENT_WEIGHT / max(1, place.model_parameters)


def _gain(experience: Experience) -> float:
    """Expected share of kept cases, close to the prior while there are few."""
    return (PRIOR_CASES * PRIOR_KEPT + experience.kept) / (PRIOR_CASES + experience.cases)


def _learned_reward(experience: Experience) -> float:
    if not math.isfinite(experience.mean_reward):
        return 0.0
    trust = experience.cases / (PRIOR_CASES + experience.cases)
    return 0.5 * trust * min(1.0, max(-1.0, REWARD_SCALE * experience.mean_reward))


def _shown(variant: Variant) -> float:
    """What the trials of a variant have shown over the usual size, as a learned reward counts."""
    return _learned_reward(Experience(kept=variant.trials, mean_reward=variant.gain))


def _size_effect(parameters_N: Doubles, layer: LayerInfo) -> Doubles:
    """0.3 … 1: more capacity helps, with diminishing returns relative to the host's size.

    A span is there because its host is too small, so it is compared with a wide hidden layer.
    """
    size = layer.parameters
    if layer.since:
        width = max(min(layer.features_in, layer.features_out), WIDE_ENOUGH)
        size = width * (layer.features_in + layer.features_out)
    effect: Doubles = 1.0 - 0.7 * np.exp(-4.0 * parameters_N / max(1, size))
    return effect


def _share(cost: float, limit: float) -> float:
    """Cost as a share of its limit; unknown costs count in full."""
    return cost / limit if limit > 0 and not math.isnan(cost) else 1.0


def _fit(blueprint: SelectableBlueprint, instability: float) -> float:
    """Among diagnostics: limit the gradient of unstable layers, measure others."""
    if blueprint.adaptation_type is not AdaptationType.ADD_DIAGNOSTIC:
        return 0.0
    limits_gradient = blueprint.kind is not GraftKind.OBSERVE
    return FIT_WEIGHT * (instability if limits_gradient else 1.0 - instability)


def _too_large(table: _Table, latency_N: Doubles, place: _Place) -> str:
    """Names the limit that even the smallest size exceeds."""
    if not (table.parameters_N <= place.max_parameters).any():
        return (
            f"Its smallest size adds {int(table.parameters_N.min()):,} parameters; "
            f"{max(0, int(place.max_parameters)):,} are left in the budget."
        )
    if not (table.memory_N <= place.max_memory_mib).any():
        known = table.memory_N[np.isfinite(table.memory_N)]
        needs = f"{known.min():.3g} MiB" if known.size else "an unknown amount of memory"
        return f"It needs {needs} at least; the limit is {place.max_memory_mib:.3g} MiB."
    if (latency_N > place.max_latency_ms).all():
        return (
            f"It takes {latency_N.min():.3g} ms at least; "
            f"the limit is {place.max_latency_ms:.3g} ms."
        )
    return "No size is within all limits at once."


def _candidate(scored: _Scored) -> Candidate:
    variant = scored.table.variants.get(scored.size)
    return Candidate(
        blueprint=scored.blueprint.slug,
        config=dict(scored.table.configs[scored.size]),
        score=scored.score,
        forecast=replace(scored.table.forecasts[scored.size], latency_ms=scored.latency_ms),
        terms=scored.terms,
        variant=variant.uid if variant else "",
    )


def _rank(scored: _Scored) -> tuple[float, float, str]:
    parameters = float(scored.table.parameters_N[scored.size])
    return (-scored.score, parameters, scored.blueprint.slug)


def _beaten(scored: _Scored, best: _Scored) -> str:
    worst = min(scored.terms, key=lambda name: (scored.terms[name] - best.terms[name], name))
    return (
        f"Score {scored.score:.3f} against {best.score:.3f} of {best.blueprint.slug}; the largest "
        f"gap is in {worst} ({scored.terms[worst]:+.3f} against {best.terms[worst]:+.3f})."
    )


def _words(adaptation_type: AdaptationType) -> str:
    """``add_ffn`` in words."""
    return adaptation_type.replace("_", " ")
