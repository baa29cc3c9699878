"""From a run's snapshot to one decision, or to no decision with reasons.

    decide(snapshot, policy, catalog, limits, rng):
        features   = extract_features(snapshot)                    1  describe the run
        proposals  = policy.propose(snapshot, features, rng)       2  ranked proposals
        for decision in proposals:
            gates     = check_run(decision)                        3  may it be changed now?
            selection = select(blueprint × size) or next           4  blueprint, and why not others
            checks    = gates + check_blueprint(cost, risk)        5  within every limit?
            if no hard check fails: return Decision(asks=failed soft checks)
        return Declined(all reasons)

Pure: equal inputs give equal results, in any order of the catalogue. The snapshot holds all inputs,
so a stored one (:mod:`esper.replay`) replays the decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from esper.constraints import check_gates, check_run, gate_inputs, required_evidence
from esper.contracts import (
    EARLIER_COLUMNS,
    SIGNALS,
    AdaptationDecision,
    Candidate,
    Check,
    Decision,
    Declined,
    Experience,
    LayerInfo,
    Reason,
    RunSnapshot,
    SafetyPolicy,
    Selection,
    Signal,
    WhyNot,
)
from esper.contracts.spans import span, why_no_span
from esper.health import Features, extract_features
from esper.policy import Policy
from esper.policy.base import chance_of
from esper.policy.cases import measured
from esper.policy.confidence import Confidence, Subject, corrected, shipped_models
from esper.policy.heuristic import CAPACITY
from esper.selection import BlueprintSelector, SelectableBlueprint

Catalog = BlueprintSelector | Iterable[SelectableBlueprint]


def decide(
    snapshot: RunSnapshot,
    policy: Policy,
    catalog: Catalog,
    limits: SafetyPolicy,
    rng: np.random.Generator,
) -> Decision | Declined:
    """The best adaptation that no gate blocks.

    Args:
        snapshot: the state of the run.
        policy: makes the proposals.
        catalog: blueprints; reuse one ``BlueprintSelector`` to keep its tables.
        limits: all thresholds.
        rng: the policy's only source of randomness.

    Returns:
        A decision, which needs a person if ``asks`` is not empty, or the reasons against all.
    """
    selector = catalog if isinstance(catalog, BlueprintSelector) else BlueprintSelector(catalog)
    features = extract_features(snapshot, selector.types)
    proposals = policy.propose(snapshot, features, rng)
    declined: list[Declined] = []
    for proposal in proposals:
        answer = consider(
            proposal, snapshot, selector, limits, policy=policy.name, features=features
        )
        if isinstance(answer, Decision):
            return answer
        declined.append(answer)
    return _all_declined(snapshot, declined, proposals.reasons)


def chances(
    decision: Decision,
    snapshot: RunSnapshot,
    policies: Iterable[Policy],
    catalog: Catalog,
    limits: SafetyPolicy,
    generator: Callable[[], np.random.Generator],
) -> dict[str, float]:
    """By policy, the chance with which it would have made this decision, for the log.

    What the gates block differs between policies that want different layers, so each proposal of
    each policy goes through them.

    Args:
        generator: makes the generator that the decision was made with, anew for each policy.
    """
    selector = catalog if isinstance(catalog, BlueprintSelector) else BlueprintSelector(catalog)
    features = extract_features(snapshot, selector.types)
    found = {}
    for policy in policies:
        proposals = policy.propose(snapshot, features, generator())
        blocked = [
            proposal
            for proposal in [arm for arm, _ in proposals.arms] or proposals
            if isinstance(
                consider(
                    proposal, snapshot, selector, limits, policy=policy.name, features=features
                ),
                Declined,
            )
        ]
        found[policy.name] = chance_of(proposals, decision.adaptation, blocked)
    return found


def consider(
    proposal: AdaptationDecision,
    snapshot: RunSnapshot,
    selector: BlueprintSelector,
    limits: SafetyPolicy,
    *,
    policy: str,
    features: Features | None,
    extra_limits: Mapping[str, float] | None = None,
) -> Decision | Declined:
    """Steps 3 to 5 for one proposal.

    Args:
        policy: name of what made the proposal.
        features: of the snapshot. None: the caller is responsible for the evidence, and no signal
            is required.
        extra_limits: stricter limits of the caller, see ``BlueprintSelector.select``.

    Raises:
        ConfigurationError: ``extra_limits`` contains an unknown name or a value that is no limit.
    """
    placed = place_of_proposal(proposal, snapshot, limits)
    if isinstance(placed, Declined):
        return placed
    layer, gates = placed
    selection = selector.select(
        layer,
        proposal.adaptation_type,
        snapshot,
        limits,
        extra_limits=extra_limits,
        features=features,
    )
    if selection.best is None:
        return _nothing_fits(snapshot, proposal, gates, selection)
    return settle(
        proposal,
        selection.best,
        snapshot,
        selector,
        limits,
        policy=policy,
        features=features,
        why_not=selection.why_not,
        layer_kind=layer.kind,
    )


def place_of_proposal(
    proposal: AdaptationDecision, snapshot: RunSnapshot, limits: SafetyPolicy
) -> tuple[LayerInfo, tuple[Check, ...]] | Declined:
    """Step 3: the layer or span that is meant, with the gates of the run, or why not now."""
    gates = check_run(gate_inputs(snapshot, proposal), limits)
    if any(check.blocks for check in gates):
        return _declined(snapshot, proposal, gates)
    layer = snapshot.layer(proposal.layer_name)
    if layer is None:
        return Declined(snapshot.step, (f"The run has no layer {proposal.layer_name}.",), proposal)
    if not proposal.since:
        return layer, gates
    since = snapshot.layer(proposal.since)
    reason = why_no_span(since, layer) if since else f"there is no layer {proposal.since}"
    if since is None or reason:
        return Declined(snapshot.step, (f"{_place(proposal)}: {reason}.",), proposal)
    return span(since, layer), gates


def settle(
    proposal: AdaptationDecision,
    best: Candidate,
    snapshot: RunSnapshot,
    selector: BlueprintSelector,
    limits: SafetyPolicy,
    *,
    policy: str,
    features: Features | None,
    layer_kind: str,
    why_not: tuple[WhyNot, ...] = (),
) -> Decision | Declined:
    """Step 5 for a blueprint that is chosen: its confidence, and every gate."""
    sure = confidence_of(proposal, best, snapshot, layer_kind, features)
    chosen = replace(proposal, confidence=sure.value, reasons=_weighed(proposal, sure))
    checks = _all_checks(chosen, best, snapshot, features, selector, limits)
    if any(check.blocks for check in checks):
        return replace(_declined(snapshot, chosen, checks), why_not=why_not)
    return Decision(
        adaptation=chosen,
        blueprint=best.blueprint,
        config=best.config,
        risk=selector.blueprint(best.blueprint).risk,
        forecast=best.forecast,
        checks=checks,
        why_not=why_not,
        evidence=evidence(features, chosen.layer_name) if features else {},
        step=snapshot.step,
        policy=policy,
        asks=(*(check.text for check in checks if check.asks), *_too_few(proposal, sure)),
        variant=best.variant,
    )


def confidence_of(
    proposal: AdaptationDecision,
    best: Candidate,
    snapshot: RunSnapshot,
    layer_kind: str,
    features: Features | None,
) -> Confidence:
    """The probability that the chosen blueprint helps, from cases.

    A caller who gives a confidence of its own gets it corrected by closed cases.
    """
    if math.isfinite(proposal.confidence):
        closed = snapshot.experience.get(best.blueprint, Experience())
        return corrected(proposal.confidence, closed)
    capacity = any(finding.slug == CAPACITY for finding in snapshot.findings)
    known = evidence(features, proposal.layer_name) if features else {}
    subject = Subject(
        choice=best.blueprint,
        layer=layer_kind,
        finding=CAPACITY if capacity else "",
        measured=measured(known, best.forecast.parameters, snapshot.model_parameters),
    )
    return shipped_models()["graft"].confidence(subject, snapshot.experience)


def _weighed(proposal: AdaptationDecision, sure: Confidence) -> tuple[Reason, ...]:
    """Why it is proposed, and then what the confidence is made of: the weights sum to it."""
    why = (replace(reason, weight=0.0) for reason in proposal.reasons)
    made_of = (Reason(t.name, t.observed, t.weight, t.text) for t in sure.terms)
    return (*why, *made_of, Reason("interval", math.nan, 0.0, f"its confidence is {sure.about}"))


def _too_few(proposal: AdaptationDecision, sure: Confidence) -> tuple[str, ...]:
    """A person decides while there are few cases of a kind of adaptation."""
    if math.isfinite(proposal.confidence) or sure.trusted:
        return ()
    return (f"Its confidence is {sure.about}.",)


def _all_checks(
    proposal: AdaptationDecision,
    best: Candidate,
    snapshot: RunSnapshot,
    features: Features | None,
    selector: BlueprintSelector,
    limits: SafetyPolicy,
) -> tuple[Check, ...]:
    risk = selector.blueprint(best.blueprint).risk
    known = evidence(features, proposal.layer_name) if features else {}
    required = required_evidence(risk) if features else ()
    inputs = gate_inputs(
        snapshot,
        proposal,
        best.forecast,
        risk,
        category_cases=selector.category_cases(best.blueprint, snapshot.experience),
        missing_evidence=[
            name for name in required if not math.isfinite(known.get(name, math.nan))
        ],
    )
    return check_gates(inputs, limits)


def evidence(features: Features, layer: str) -> dict[str, float]:
    """The numbers behind a decision, flat; NaN unknown.

    ``<signal>`` of the layer, ``<signal>_median`` over the run's layers, ``loss`` (its level) and
    ``loss_<feature>``. Signals that older decisions do not have are left out where unknown.
    """
    loss = features.loss
    found: dict[str, float] = {}
    for place, signal in enumerate(SIGNALS):
        value, median = features.value(layer, signal), float(features.medians[place])
        if place < EARLIER_COLUMNS[0] or not math.isnan(median):
            found |= {str(signal): value, f"{signal}_median": median}
    found |= {
        "loss": loss.level,
        "loss_initial": loss.initial,
        "loss_noise": loss.noise,
        "loss_exponent": loss.exponent,
        "loss_exponent_error": loss.exponent_error,
        "loss_plateau": loss.plateau_score,
        "loss_spike": loss.spike_score,
        "health_trend": features.trend_of(layer, Signal.HEALTH),
        "instability": features.instability(layer),
    }
    if not math.isnan(loss.held_out):
        found["loss_held_out"] = loss.held_out
    return found


def _place(proposal: AdaptationDecision) -> str:
    """What is proposed where, in words."""
    since = f"{proposal.since} … " if proposal.since else ""
    return f"{proposal.adaptation_type} at {since}{proposal.layer_name}"


def _declined(
    snapshot: RunSnapshot, proposal: AdaptationDecision, checks: tuple[Check, ...]
) -> Declined:
    name = _place(proposal)
    reasons = tuple(f"{name}: {check.text}" for check in checks if check.blocks)
    return Declined(snapshot.step, reasons, proposal, checks)


def _nothing_fits(
    snapshot: RunSnapshot,
    proposal: AdaptationDecision,
    checks: tuple[Check, ...],
    selection: Selection,
) -> Declined:
    name = _place(proposal)
    return Declined(
        snapshot.step, (f"{name}: no blueprint fits.",), proposal, checks, selection.why_not
    )


def _all_declined(
    snapshot: RunSnapshot, declined: list[Declined], reasons: tuple[str, ...]
) -> Declined:
    """Uses the first proposal's checks, because it has the highest rank."""
    if not declined:
        return Declined(snapshot.step, reasons or ("The policy proposes nothing.",))
    texts = tuple(dict.fromkeys(reason for one in declined for reason in one.reasons))
    return replace(declined[0], reasons=texts + reasons)
