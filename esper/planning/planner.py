"""From a run's snapshot to a plan: several grafts that are decided on, applied and undone together.

    plan_run(snapshot, policy, catalog, limits, rng):
        the policy proposes nothing               -> its reasons
        wishes    = every change that would answer the finding           esper.policy.heuristic
        options   = for each wish the best blueprints, each in some sizes     esper.selection
        value     = how sure it is that the option helps, less its costs, by the place's weight
        conflicts = one change for each layer, no spans that overlap, nothing beside a span
        pairs     = what two changes are worth together
        loop:
            choose the best set within the budget                        esper.planning.solver
            every gate of every member, with the members before it counted
            a member that is blocked is no option any more -> again
        fewer than two members -> no plan: the decision about one change is better made alone

The limits of one graft on memory and latency hold for the sum of a plan, because a plan counts as
one change in flight. Pure, as :func:`esper.pipeline.decide` is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from esper.contracts import (
    AdaptationType,
    Candidate,
    Decision,
    Declined,
    LayerInfo,
    Plan,
    RunSnapshot,
    SafetyPolicy,
)
from esper.health import Features, extract_features
from esper.pipeline import Catalog, confidence_of, place_of_proposal, settle
from esper.planning.solver import Budget, Option, Pair, Solution, choose
from esper.policy import Policy
from esper.policy.heuristic import CAPACITY, Wish, wishes
from esper.selection import BlueprintSelector

MAX_WISHES = 8
BLUEPRINTS_EACH = 2  # of one wish
MAX_CONFLICTS_TOLD = 5
# Two layers of which one feeds the other relieve the same bottleneck: as a second blueprint at one
# layer costs in selection (REDUNDANCY_WEIGHT).
NEIGHBOURS = -0.1
# Layers that read the same input, such as query and value: with equal parameters, adapters at both
# are better than a larger one at one of them (Hu et al. 2021, LoRA, table 5).
SIBLINGS = 0.05
_ADAPTERS = frozenset({AdaptationType.ADD_EFFICIENCY})
ASKS = (
    "No closed plan tells how sure several changes at once are, so a person decides on the whole.",
)


@dataclass(frozen=True, slots=True)
class _Possible:
    """One wish with one blueprint at one size; ``first`` and ``last`` are places in the order."""

    wish: Wish
    layer: LayerInfo
    candidate: Candidate
    value: float
    first: int
    last: int

    @property
    def name(self) -> str:
        """For people."""
        since = f"{self.wish.decision.since} … " if self.wish.decision.since else ""
        return f"{self.candidate.blueprint} at {since}{self.layer.name}"


def plan_run(
    snapshot: RunSnapshot,
    policy: Policy,
    catalog: Catalog,
    limits: SafetyPolicy,
    rng: np.random.Generator,
    *,
    changes: int | None = None,
) -> Plan | Declined:
    """The best set of grafts within the limits, or why there is no plan.

    Args:
        snapshot: the state of the run.
        policy: says whether anything should be changed.
        catalog: blueprints; reuse one ``BlueprintSelector`` to keep its tables.
        limits: all thresholds; those on the cost of one graft hold for the whole plan.
        rng: the policy's only source of randomness.
        changes: of the plan, at most; None: as many as ``limits`` allows.
    """
    selector = catalog if isinstance(catalog, BlueprintSelector) else BlueprintSelector(catalog)
    features = extract_features(snapshot, selector.types)
    proposals = policy.propose(snapshot, features, rng)
    finding = next((f for f in snapshot.findings if f.slug == CAPACITY), None)
    if not len(proposals) or finding is None:
        return Declined(snapshot.step, proposals.reasons or ("The policy proposes nothing.",))
    most = limits.max_plan_changes if changes is None else changes
    budget = _budget(snapshot, limits, most)
    wanted = wishes(snapshot, features, finding, most=MAX_WISHES)
    possible = dict(_possible(wanted, snapshot, selector, limits, features))
    return _settled(possible, budget, snapshot, selector, limits, features, policy.name)


def _budget(snapshot: RunSnapshot, limits: SafetyPolicy, changes: int) -> Budget:
    left = limits.most_added_parameters(snapshot.model_parameters) - snapshot.added_parameters
    today = limits.max_adaptations_per_day - snapshot.adaptations_today
    return Budget(
        changes=max(0, min(changes, today)),
        parameters=max(0, left),
        memory_mib=limits.max_memory_mib,
        latency_ms=limits.max_latency_ms,
    )


def _possible(
    wanted: Iterable[Wish],
    snapshot: RunSnapshot,
    selector: BlueprintSelector,
    limits: SafetyPolicy,
    features: Features,
) -> Iterable[tuple[str, _Possible]]:
    places = {layer.name: place for place, layer in enumerate(snapshot.layers)}
    for wish in wanted:
        decision = wish.decision
        placed = place_of_proposal(decision, snapshot, limits)
        if isinstance(placed, Declined) or _keeps_from_export(wish, snapshot):
            continue
        layer, _ = placed
        candidates = selector.options(
            layer,
            decision.adaptation_type,
            snapshot,
            limits,
            features=features,
            most=BLUEPRINTS_EACH,
        )
        last = places[layer.name]
        first = places[decision.since] if decision.since else last
        sure: dict[str, float] = {}
        full: dict[str, float] = {}
        for candidate in candidates:  # of a blueprint the largest size first
            slug, gain = candidate.blueprint, candidate.terms["gain"]
            if slug not in sure:
                found = confidence_of(decision, candidate, snapshot, layer.kind, features)
                sure[slug], full[slug] = found.value, gain
            helps = wish.weight * sure[slug] * (gain / full[slug] if full[slug] else 0.0)
            key = f"{layer.name}|{decision.since}|{slug}|{candidate.forecast.parameters:012d}"
            value = candidate.score - gain + helps
            yield key, _Possible(wish, layer, candidate, value, min(first, last), max(first, last))


def _keeps_from_export(wish: Wish, snapshot: RunSnapshot) -> bool:
    """A span is merged into a wider hidden layer at export, unless a graft stays at its ends."""
    since = wish.decision.since
    ends = (since, wish.decision.layer_name) if since else ()
    history = snapshot.history
    return any(name in history and history[name].grafts for name in ends)


def _settled(
    possible: dict[str, _Possible],
    budget: Budget,
    snapshot: RunSnapshot,
    selector: BlueprintSelector,
    limits: SafetyPolicy,
    features: Features,
    policy: str,
) -> Plan | Declined:
    """Solve, and again without what a gate blocks."""
    refused: list[str] = []
    while True:
        solution = _chosen(possible, budget)
        members = [possible[key] for key in solution.chosen]
        members.sort(key=lambda one: (-one.value, one.name))
        decided: list[Decision] = []
        now = snapshot
        for member in members:
            answer = settle(
                member.wish.decision,
                member.candidate,
                now,
                selector,
                limits,
                policy=policy,
                features=features,
                layer_kind=member.layer.kind,
            )
            if isinstance(answer, Declined):
                refused += [f"{member.name}: {reason}" for reason in answer.reasons]
                possible = {key: one for key, one in possible.items() if one is not member}
                break
            decided.append(answer)
            now = replace(
                now,
                added_parameters=now.added_parameters + answer.forecast.parameters,
                adaptations_today=now.adaptations_today + 1,
            )
        else:
            return _answer(decided, members, solution, possible, budget, snapshot, policy, refused)


def _chosen(possible: Mapping[str, _Possible], budget: Budget) -> Solution:
    options = [
        Option(
            key=key,
            place=one.layer.name,
            value=one.value,
            parameters=one.candidate.forecast.parameters,
            memory_mib=one.candidate.forecast.memory_mib,
            latency_ms=one.candidate.forecast.latency_ms,
        )
        for key, one in possible.items()
    ]
    return choose(options, budget, conflicts=_conflicts(possible), pairs=_pairs(possible))


def _conflicts(possible: Mapping[str, _Possible]) -> list[Pair]:
    return [
        (a, b)
        for (a, one), (b, other) in itertools.combinations(possible.items(), 2)
        if one.layer.name != other.layer.name and _meet(one, other)
    ]


def _meet(one: _Possible, other: _Possible) -> bool:
    """A span has a layer in common with another span or with a graft at one layer."""
    if not one.wish.decision.since and not other.wish.decision.since:
        return False
    return one.first <= other.last and other.first <= one.last


def _why_conflict(one: _Possible, other: _Possible) -> str:
    """Why two changes at different layers exclude each other."""
    if one.wish.decision.since and other.wish.decision.since:
        return f"it overlaps with {other.name}"
    return f"beside {other.name}, the span could not be exported"


def _pairs(possible: Mapping[str, _Possible]) -> dict[Pair, float]:
    return {
        (a, b): worth
        for (a, one), (b, other) in itertools.combinations(possible.items(), 2)
        if one.layer.name != other.layer.name and (worth := _together(one, other))
    }


def _together(one: _Possible, other: _Possible) -> float:
    """What two changes are worth together, beside what each is worth."""
    a, b = one.layer, other.layer
    if b.name in a.feeds or a.name in b.feeds:
        return NEIGHBOURS
    kinds = {one.wish.decision.adaptation_type, other.wish.decision.adaptation_type}
    same_input = a.order > 0 and a.in_shape == b.in_shape and a.feeds == b.feeds and bool(a.feeds)
    return SIBLINGS if same_input and kinds <= _ADAPTERS else 0.0


def _answer(
    decided: Sequence[Decision],
    members: Sequence[_Possible],
    solution: Solution,
    possible: Mapping[str, _Possible],
    budget: Budget,
    snapshot: RunSnapshot,
    policy: str,
    refused: Sequence[str],
) -> Plan | Declined:
    if len(decided) < 2:
        reason = f"{len(decided)} change fits together with the limits and gates; a plan has two."
        return Declined(snapshot.step, (reason, *refused))
    asks = dict.fromkeys(line for decision in decided for line in decision.asks)
    return Plan(
        members=tuple(decided),
        value=solution.value,
        parameters=int(budget.parameters),
        memory_mib=budget.memory_mib,
        latency_ms=budget.latency_ms,
        reasons=(*_reasons(members, possible, solution, budget), *refused),
        asks=(*ASKS, *asks),
        step=snapshot.step,
        policy=policy,
        best=solution.best,
    )


def _reasons(
    members: Sequence[_Possible],
    possible: Mapping[str, _Possible],
    solution: Solution,
    budget: Budget,
) -> Iterable[str]:
    """Why just these."""
    shown = "no other set is worth more" if solution.best else "the best set found in time"
    worth = solution.value
    yield f"{len(members)} of {len(possible)} options, together worth {worth:.3f}; {shown}."
    parameters = sum(one.candidate.forecast.parameters for one in members)
    memory = sum(one.candidate.forecast.memory_mib for one in members)
    latency = sum(one.candidate.forecast.latency_ms for one in members)
    yield (
        f"Together {parameters:,} of at most {int(budget.parameters):,} parameters, "
        f"{memory:.3g} of {budget.memory_mib:.3g} MiB, {latency:.3g} of {budget.latency_ms:.3g} ms."
    )
    for one, other in itertools.combinations(members, 2):
        worth = _together(one, other)
        if worth:
            word = "are worth more" if worth > 0 else "help against the same bottleneck"
            yield f"{one.name} and {other.name} {word} together: {worth:+.2f}."
    places = {one.layer.name for one in members}
    told: dict[str, str] = {}
    for left in possible.values():
        meets = next((one for one in members if _meet(left, one)), None)
        if left.layer.name not in places and meets is not None:
            told[left.name] = f"Not {left.name}: {_why_conflict(left, meets)}."
    yield from list(told.values())[:MAX_CONFLICTS_TOLD]
