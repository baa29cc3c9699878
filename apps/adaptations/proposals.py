"""Proposals of Tamiyo. Every gate is checked again, in the transaction that writes the proposal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from django.db import transaction

from apps.accounts.actors import Actor, ActorKind
from apps.adaptations.binding import shown_hash
from apps.adaptations.compile_jobs import queue_compilation
from apps.adaptations.decisions import record_decision
from apps.adaptations.history import (
    category_cases,
    closed_confidences,
    freeze_asks,
    layer_histories,
    run_facts,
)
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.adaptations.shadows import shadow_at_random
from apps.adaptations.variants import check_admitted
from apps.blueprints.models import Blueprint
from apps.policies.models import PolicyVersion
from apps.policies.services import current_policy
from apps.rest.clock import now as database_now
from apps.rest.numbers import finite_or_none
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.runs.services import check_epoch, lock_run
from apps.violations.services import record_violation
from esper.constraints import GateInputs, check_gates, required_evidence
from esper.contracts import (
    AdaptationState,
    Check,
    CostForecast,
    LayerHistory,
    LayerInfo,
    Risk,
    RunMode,
    SafetyPolicy,
    Severity,
    ViolationRule,
)
from esper.contracts.protocol import Decline, Proposal
from esper.policy.calibration import overconfidence

# A proposal that must wait, or that a person's switch stops, breaks no limit.
_ROUTINE = frozenset(
    {
        ViolationRule.FROZEN,
        ViolationRule.RUN_MODE,
        ViolationRule.COOLDOWN,
        ViolationRule.ONE_IN_FLIGHT,
        ViolationRule.CONFIDENCE,
    }
)


class GateClosedError(Problem):
    """A gate did not pass; only violations were written."""

    def __init__(self, checks: list[Check]) -> None:
        super().__init__(
            409,
            "gate-closed",
            " ".join(check.text for check in checks),
            checks=[asdict(check) for check in checks],
        )
        self.checks = checks


def propose_adaptation(
    *, run: Run, proposal: Proposal, idempotency_key: str, actor: Actor
) -> Adaptation:
    """Write an adaptation, then approve it by rule or wait for a person's decision.

    A repeated ``idempotency_key`` returns the adaptation of the first call.

    Raises:
        GateClosedError: a hard gate did not pass; violations are written for it.
        Problem: old epoch, unknown layer or blueprint, or the layer is busy.
    """
    try:
        with transaction.atomic():
            return _propose(run, proposal, idempotency_key, actor)
    except GateClosedError as closed:
        # Here, because the transaction above was rolled back, and the violations would be too.
        record_closed_gates(run=run, layer=proposal.layer, step=proposal.step, checks=closed.checks)
        raise


def _propose(run: Run, proposal: Proposal, idempotency_key: str, actor: Actor) -> Adaptation:
    run = lock_run(run.pk)  # one proposal of a run at a time
    known = Adaptation.objects.filter(idempotency_key=idempotency_key).first()
    if known is not None:
        return known
    check_epoch(run, proposal.epoch)
    layer = layer_of(run, proposal.layer, proposal.since)
    blueprint = blueprint_of(proposal.blueprint)
    policy = current_policy(run)
    checks = (
        *check_gates(gate_inputs(run, proposal, blueprint), policy.safety_policy()),
        check_compatibility(run, proposal.layer, blueprint),
    )
    closed = [check for check in checks if check.blocks]
    if closed:
        raise GateClosedError(closed)
    asks = [check.text for check in checks if check.asks]
    asks += _drift(proposal.confidence, policy.safety_policy())
    asks += freeze_asks(run)
    # Tamiyo may be more careful than the gates, never less.
    asks += [line for line in proposal.asks if line not in asks]
    adaptation = graft_row(run, proposal, blueprint, policy, checks, asks, idempotency_key)
    record_decision(run=run, message=proposal, adaptation=adaptation)
    announce_proposal(adaptation, actor)
    shadow_at_random(adaptation)
    return _send_on(adaptation, layer)


def _drift(confidence: float, limits: SafetyPolicy) -> list[str]:
    """Why a person decides although the confidence is high: the newest ones were too high."""
    if not confidence >= limits.confidence_auto:
        return []  # asks anyway
    closed = closed_confidences()
    excess = overconfidence([said for _, said, _ in closed], [kept for _, _, kept in closed])
    needed = limits.confidence_auto + excess
    if confidence >= needed:
        return []
    return [
        f"The newest confidences were {excess:.2f} too high on the average, so {needed:.2f} is "
        f"needed instead of {limits.confidence_auto:.2f}; this one is {confidence:.2f}."
    ]


def layer_of(run: Run, name: str, since: str) -> LayerInfo:
    """Raises ``Problem`` 422 where there is no such layer or span, or it takes no graft."""
    layer = run.layer_info(name)
    if layer is None:
        raise Problem(422, "unknown-layer", f"Run {run.name} has no layer called {name!r}.")
    if not layer.graftable:
        raise Problem(422, "incompatible-layer", f"{name} cannot be grafted: {layer.reason}")
    place = run.place_of(name, since)
    if isinstance(place, str):
        raise Problem(422, "incompatible-layer", place)
    return place


def blueprint_of(slug: str) -> Blueprint:
    """Raises ``Problem`` 422 for an unknown one, ``GateClosedError`` for one that is off."""
    blueprint = Blueprint.objects.filter(slug=slug, present=True).first()
    if blueprint is None:
        raise Problem(422, "unknown-blueprint", f"There is no blueprint called {slug!r}.")
    if not blueprint.enabled:
        raise GateClosedError(
            [
                Check(
                    rule=ViolationRule.COMPATIBILITY,
                    passed=False,
                    hard=True,
                    observed="disabled",
                    limit="enabled",
                    text=f"Blueprint {slug} is switched off: {blueprint.disabled_reason}",
                )
            ]
        )
    return blueprint


def check_compatibility(run: Run, layer: str, blueprint: Blueprint, *, besides: int = 0) -> Check:
    """The grafts that the layer has already must be compatible with the new one."""
    grafts = layer_histories(run, besides=besides).get(layer, LayerHistory()).grafts
    others = {row.slug: row.conflicts for row in Blueprint.objects.filter(slug__in=grafts)}
    clashing = sorted(
        slug
        for slug, conflicts in others.items()
        if slug == blueprint.slug or slug in blueprint.conflicts or blueprint.slug in conflicts
    )
    missing = blueprint.requires if not set(blueprint.requires) & set(grafts) else []
    carried = ", ".join(grafts) or "nothing"
    return Check(
        rule=ViolationRule.COMPATIBILITY,
        passed=not clashing and not missing,
        hard=True,
        observed=carried,
        limit=f"{' or '.join(missing)} first"
        if missing
        else f"nothing that conflicts with {blueprint.slug}",
        text=_compatibility_text(layer, blueprint.slug, carried, clashing, missing),
    )


def _compatibility_text(
    layer: str, slug: str, carried: str, clashing: list[str], missing: list[str]
) -> str:
    if clashing:
        return f"{layer} carries {', '.join(clashing)}, which conflicts with {slug}."
    if missing:
        return f"{slug} needs {' or '.join(missing)} on {layer} first, which carries {carried}."
    return f"{layer} carries {carried}; {slug} is compatible with that."


def gate_inputs(run: Run, proposal: Proposal, blueprint: Blueprint) -> GateInputs:
    """The gates' numbers of a proposal."""
    return gate_inputs_of(
        run,
        blueprint,
        layer=proposal.layer,
        step=proposal.step,
        forecast=proposal.forecast,
        evidence=proposal.evidence,
        confidence=proposal.confidence,
    )


def gate_inputs_of(
    run: Run,
    blueprint: Blueprint,
    *,
    layer: str,
    step: int,
    forecast: CostForecast,
    evidence: Mapping[str, float],
    confidence: float,
    besides: int = 0,
) -> GateInputs:
    """The gates' numbers of a graft; ``besides``: its own row, where it has one already."""
    facts = run_facts(run, besides=besides)
    history = layer_histories(run, besides=besides).get(layer, LayerHistory())
    risk = Risk(blueprint.risk)  # from the catalogue, not from the proposal
    seen = run.last_seen_at
    return GateInputs(
        mode=RunMode(run.mode),
        step=step,
        frozen=facts.frozen,
        layer_in_flight=history.in_flight,
        run_in_flight=facts.in_flight,
        layer_last_step=history.last_adaptation_step,
        layer_rolled_back=history.last_rolled_back,
        layer_refused_seconds=history.refused_seconds,
        run_last_step=facts.last_step,
        run_rolled_back=facts.last_rolled_back,
        adaptations_today=facts.today,
        model_parameters=run.model_parameters,
        added_parameters=facts.added_parameters,
        new_parameters=forecast.parameters,
        memory_mib=forecast.memory_mib,
        latency_ms=forecast.latency_ms,
        risk=risk,
        category_cases=category_cases(blueprint.category),
        missing_evidence=tuple(
            name
            for name in required_evidence(risk)
            if not math.isfinite(evidence.get(name, math.nan))
        ),
        age_seconds=(database_now() - seen).total_seconds() if seen else math.nan,
        confidence=confidence,
    )


def graft_row(
    run: Run,
    proposal: Proposal,
    blueprint: Blueprint,
    policy: PolicyVersion,
    checks: tuple[Check, ...],
    asks: list[str],
    idempotency_key: str,
    **of_plan: Any,
) -> Adaptation:
    """Write the row of a proposal; ``of_plan``: its plan and place, where it is a member.

    Raises ``Problem`` 409 for the size of a variant that is not admitted.
    """
    forecast = proposal.forecast
    adaptation = Adaptation(
        run=run,
        run_epoch=run.epoch,
        idempotency_key=idempotency_key,
        layer=proposal.layer,
        since=proposal.since,
        adaptation_type=proposal.adaptation_type,
        blueprint=blueprint,
        config=proposal.config,
        variant=check_admitted(proposal.variant, blueprint),
        risk=blueprint.risk,
        confidence=finite_or_none(proposal.confidence),
        urgency=finite_or_none(proposal.urgency),
        forecast_parameters=forecast.parameters,
        forecast_flops=forecast.flops,
        forecast_memory_mib=finite_or_none(forecast.memory_mib),
        forecast_latency_ms=finite_or_none(forecast.latency_ms),
        policy=proposal.policy,
        safety_policy=policy,
        proposed_step=proposal.step,
        evidence=without_unknown(proposal.evidence),
        reasons=[without_unknown(asdict(reason)) for reason in proposal.reasons],
        checks=[asdict(check) for check in checks],
        why_not=[asdict(line) for line in proposal.why_not],
        asks=asks,
        **of_plan,
    )
    adaptation.evidence_hash = shown_hash(adaptation)
    adaptation.save()
    return adaptation


def without_unknown(members: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that are stored for people; null where one is not finite."""
    return {
        name: finite_or_none(value) if isinstance(value, float) else value
        for name, value in members.items()
    }


def announce_proposal(adaptation: Adaptation, actor: Actor) -> None:
    from apps.audit.services import record

    record(
        actor=actor,
        act="adaptation.proposed",
        object_kind="adaptation",
        object_uid=adaptation.uid,
        run_uid=adaptation.run.uid,
        data={
            "number": adaptation.number,
            "layer": adaptation.layer,
            "kind": str(adaptation.kind),
            "blueprint": adaptation.slug,
            "title": adaptation.title,
            "confidence": adaptation.confidence,
            "evidence_hash": adaptation.evidence_hash,
            "to": str(adaptation.state),
            "version": adaptation.version,
            **({"plan": adaptation.plan.uid} if adaptation.plan else {}),
        },
    )


def _send_on(adaptation: Adaptation, layer: LayerInfo) -> Adaptation:
    policy = adaptation.safety_policy
    rule = Actor(ActorKind.RULE, f"policy v{policy.version}")
    if adaptation.asks:
        reason = " ".join(adaptation.asks)
        return transition(adaptation, AdaptationState.AWAITING_APPROVAL, actor=rule, reason=reason)
    threshold = policy.safety_policy().confidence_auto
    sentence = (
        f"confidence {adaptation.confidence:.2f} ≥ {threshold:.2f} and risk {adaptation.risk}"
    )
    transition(
        adaptation,
        AdaptationState.APPROVED,
        actor=rule,
        reason=sentence,
        decided_rule=f"policy v{policy.version}: {sentence}",
        decided_at=database_now(),
    )
    return queue_compilation(adaptation, layer=layer, actor=rule)


@transaction.atomic
def record_closed_gates(
    *, run: Run, layer: str, step: int, checks: list[Check], action: str = "Nothing was grafted."
) -> None:
    """Write a violation for each broken limit; having to wait is no violation."""
    for check in checks:
        if check.rule in _ROUTINE:
            continue
        record_violation(
            run=run,
            rule=check.rule,
            severity=Severity.CAUTION,
            observed=check.observed,
            limit=check.limit,
            text=f"{layer or run.name}: {check.text}",
            action=action,
            layer=layer,
            step=step,
        )


def record_decline(*, run: Run, decline: Decline) -> None:
    """Record that Tamiyo declined by itself; broken limits become violations.

    Raises:
        Problem: the run has a newer epoch, or has ended.
    """
    check_epoch(run, decline.epoch)
    with transaction.atomic():
        record_decision(run=run, message=decline)
        record_closed_gates(
            run=run,
            layer=decline.layer,
            step=decline.step,
            checks=[check for check in decline.checks if check.blocks],
        )
