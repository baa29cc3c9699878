"""Plans of Tamiyo. Every gate is checked again for each member, with those before it counted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from django.db import transaction

from apps.accounts.actors import Actor, ActorKind
from apps.adaptations.binding import plan_hash
from apps.adaptations.decisions import record_decision
from apps.adaptations.lifecycle import can_be_approved_from, transition
from apps.adaptations.models import Adaptation, Plan
from apps.adaptations.plan_progress import tell_plan
from apps.adaptations.proposals import (
    GateClosedError,
    announce_proposal,
    blueprint_of,
    check_compatibility,
    gate_inputs,
    graft_row,
    layer_of,
    record_closed_gates,
)
from apps.blueprints.models import Blueprint
from apps.policies.models import PolicyVersion
from apps.policies.services import current_policy
from apps.rest.numbers import finite_or_none
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.runs.services import check_epoch, lock_run
from esper.constraints import check_gates
from esper.contracts import AdaptationState, Check, SafetyPolicy, ViolationRule
from esper.contracts.protocol import PlanProposal, Proposal

ASKS = "Several changes are made at once, so a person decides on the whole."


@dataclass(frozen=True, slots=True)
class _Member:
    proposal: Proposal
    blueprint: Blueprint
    checks: tuple[Check, ...]

    @property
    def asks(self) -> list[str]:
        asks = [check.text for check in self.checks if check.asks]
        return asks + [line for line in self.proposal.asks if line not in asks]


def propose_plan(*, run: Run, proposal: PlanProposal, idempotency_key: str, actor: Actor) -> Plan:
    """Write a plan and its members, which then wait for a person.

    A repeated ``idempotency_key`` returns the plan of the first call.

    Raises:
        GateClosedError: a hard gate of a member, or a limit of the whole, did not pass.
        Problem: old epoch, unknown layer or blueprint, members that exclude each other, or more
            of them than the policy allows.
    """
    try:
        with transaction.atomic():
            return _propose(run, proposal, idempotency_key, actor)
    except GateClosedError as closed:
        record_closed_gates(run=run, layer="", step=proposal.step, checks=closed.checks)
        raise


def _propose(run: Run, proposal: PlanProposal, idempotency_key: str, actor: Actor) -> Plan:
    run = lock_run(run.pk)
    known = Plan.objects.filter(idempotency_key=idempotency_key).first()
    if known is not None:
        return known
    check_epoch(run, proposal.epoch)
    policy = current_policy(run)
    limits = policy.safety_policy()
    _check_size(proposal, limits)
    _check_apart(run, proposal.members)
    members = _checked(run, proposal, limits)
    whole = _check_whole(proposal, limits)
    closed = [check for check in whole if check.blocks]
    closed += [check for member in members for check in member.checks if check.blocks]
    if closed:
        raise GateClosedError(closed)
    plan = _write(run, proposal, policy, members, whole, idempotency_key)
    for place, member in enumerate(members):
        _write_member(plan, place, member, f"{idempotency_key}:{place}", actor)
    plan.evidence_hash = plan_hash(plan)
    plan.save(update_fields=["evidence_hash"])
    tell_plan(plan, actor, "proposed")
    return plan


def _check_size(proposal: PlanProposal, limits: SafetyPolicy) -> None:
    if len(proposal.members) > limits.max_plan_changes:
        raise Problem(
            409,
            "plan-too-large",
            f"The plan has {len(proposal.members)} changes; the policy allows "
            f"{limits.max_plan_changes} (max_plan_changes).",
        )


def _check_apart(run: Run, members: Sequence[Proposal]) -> None:
    """No two at one layer, and nothing within a span."""
    names = [layer["name"] for layer in run.layers]
    covered = []
    for member in members:
        layer_of(run, member.layer, member.since)
        ends = sorted(names.index(name) for name in (member.since or member.layer, member.layer))
        covered.append((member, ends))
    for (one, first), (other, second) in itertools.combinations(covered, 2):
        if first[0] <= second[1] and second[0] <= first[1]:
            raise Problem(
                422,
                "plan-conflict",
                f"The changes at {one.layer} and {other.layer} exclude each other: they have a "
                "layer in common.",
            )


def _checked(run: Run, proposal: PlanProposal, limits: SafetyPolicy) -> list[_Member]:
    found: list[_Member] = []
    parameters = 0
    for place, member in enumerate(proposal.members):
        blueprint = blueprint_of(member.blueprint)
        inputs = gate_inputs(run, member, blueprint)
        inputs = replace(
            inputs,
            added_parameters=inputs.added_parameters + parameters,
            adaptations_today=inputs.adaptations_today + place,
        )
        checks = (*check_gates(inputs, limits), check_compatibility(run, member.layer, blueprint))
        found.append(_Member(member, blueprint, checks))
        parameters += member.forecast.parameters
    return found


def _check_whole(proposal: PlanProposal, limits: SafetyPolicy) -> tuple[Check, ...]:
    """The limits of one graft hold for the sum: a plan is one change in flight."""
    memory = sum(member.forecast.memory_mib for member in proposal.members)
    latency = sum(member.forecast.latency_ms for member in proposal.members)
    return (
        _sum_check(ViolationRule.MEMORY, memory, limits.max_memory_mib, "MiB", hard=True),
        # As of one graft: unknown asks a person, and the measured one is checked before dispatch.
        _sum_check(
            ViolationRule.LATENCY,
            latency,
            limits.max_latency_ms,
            "ms",
            hard=math.isfinite(latency),
        ),
    )


def _sum_check(rule: ViolationRule, value: float, limit: float, unit: str, *, hard: bool) -> Check:
    known = math.isfinite(value)
    observed = f"{value:.3g} {unit}" if known else "unknown"
    return Check(
        rule=rule,
        passed=value <= limit if known else None,
        hard=hard,
        observed=observed,
        limit=f"{limit:.3g} {unit}",
        text=f"All changes together: {observed} of at most {limit:.3g} {unit}.",
    )


def _write(
    run: Run,
    proposal: PlanProposal,
    policy: PolicyVersion,
    members: Sequence[_Member],
    whole: Sequence[Check],
    idempotency_key: str,
) -> Plan:
    asks = [ASKS, *(check.text for check in whole if check.asks), *proposal.asks]
    asks += [line for member in members for line in member.asks]
    seconds = policy.safety_policy().approval_timeout_seconds
    return Plan.objects.create(
        run=run,
        run_epoch=run.epoch,
        idempotency_key=idempotency_key,
        policy=proposal.policy,
        safety_policy=policy,
        proposed_step=proposal.step,
        value=finite_or_none(proposal.value),
        best=proposal.best,
        limits={
            "parameters": proposal.parameters,
            "memory_mib": finite_or_none(proposal.memory_mib),
            "latency_ms": finite_or_none(proposal.latency_ms),
        },
        reasons=list(proposal.reasons),
        asks=list(dict.fromkeys(asks)),
        checks=[asdict(check) for check in whole],
        deadline_at=can_be_approved_from(run) + timedelta(seconds=seconds),
    )


def _write_member(plan: Plan, place: int, member: _Member, key: str, actor: Actor) -> Adaptation:
    adaptation = graft_row(
        plan.run,
        member.proposal,
        member.blueprint,
        plan.safety_policy,
        member.checks,
        member.asks or [ASKS],
        key,
        plan=plan,
        plan_place=place,
    )
    record_decision(run=plan.run, message=member.proposal, adaptation=adaptation)
    announce_proposal(adaptation, actor)
    rule = Actor(ActorKind.RULE, f"policy v{plan.safety_policy.version}")
    reason = f"part {place + 1} of plan P-{plan.number}"
    transition(adaptation, AdaptationState.AWAITING_APPROVAL, actor=rule, reason=reason)
    return adaptation
