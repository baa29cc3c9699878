"""What people do with a plan: approve it once, reject it, or undo it as a whole."""

from __future__ import annotations

from typing import Any

from django.db import transaction

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, Permission, may
from apps.adaptations.acts import (
    check_act,
    check_binding,
    check_drift,
    check_reason,
    go_ahead,
    may_approve,
)
from apps.adaptations.binding import plan_hash
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation, Plan
from apps.adaptations.plan_progress import (
    StalePlanError,
    advance_plan,
    move_plan,
    take_back,
    tell_plan,
)
from apps.adaptations.votes import vote, votes_missing, votes_needed
from apps.rest.clock import now as database_now
from apps.rest.problems import Problem
from apps.runs.services import lock_run
from esper.contracts import AdaptationState, PlanState, RejectReason, Risk

P = PlanState
DEADLINE_PASSED = "The deadline has passed. Tamiyo plans again while there is a reason."
_ACTS = {
    "approve": (Act.APPROVE, frozenset({P.AWAITING_APPROVAL})),
    "reject": (Act.REJECT, frozenset({P.AWAITING_APPROVAL})),
    "undo": (Act.ROLL_BACK, frozenset({P.APPLYING, P.APPLIED, P.SETTLED})),
}


def plan_permissions(plan: Plan, user: User) -> dict[str, Permission]:
    """For each act: whether this person may do it now, and if not, why."""
    answers: dict[str, Permission] = {}
    for name, (act, states) in _ACTS.items():
        if plan.state not in states:
            word = plan.state.replace("_", " ")
            answers[name] = Permission(False, "decision-not-pending", f"The plan is {word}.")
        else:
            answers[name] = may(user, act, of=plan.run)
    if answers["approve"].allowed:
        answers["approve"] = _may_approve_now(plan, user)
    if answers["undo"].allowed and plan.run.ended:
        why = f"The run is {plan.run.state}; nothing can change."
        answers["undo"] = Permission(False, "run-ended", why)
    return answers


def _may_approve_now(plan: Plan, user: User) -> Permission:
    if plan.deadline_at <= database_now():
        return Permission(False, "decision-expired", DEADLINE_PASSED)
    for member in members_of(plan):
        answer = may_approve(member, user)
        if not answer.allowed:
            return answer
    return Permission(True)


def members_of(plan: Plan) -> list[Adaptation]:
    """In the order in which they are applied."""
    rows = plan.members.select_related("run__owner", "blueprint", "safety_policy", "job", "plan")
    return list(rows.order_by("plan_place"))


def plan_risk(plan: Plan) -> Risk:
    """Of its riskiest member."""
    risks = [Risk(risk) for risk in plan.members.values_list("risk", flat=True)]
    return max(risks, key=list(Risk).index, default=Risk.HIGH)


@transaction.atomic
def approve_plan(
    *,
    plan: Plan,
    user: User,
    via: str,
    version: int | None,
    evidence_hash: str,
    reason: str = "",
    accept_drift: bool = False,
) -> Plan:
    """Approve all of a plan: every kernel is built, and each member is sent in its turn.

    Args:
        evidence_hash: of the whole plan that the person was shown.

    Raises:
        Problem: not allowed (403), not what was shown or proposed (412), decided already or too
            late (409), proposed to a trainer that was started again (409), the evidence of a
            member has drifted (409), or adaptation is switched off (423).
    """
    _prepare(plan, user, "approve", version)
    members = members_of(plan)
    if evidence_hash != plan.evidence_hash or plan_hash(plan) != plan.evidence_hash:
        raise Problem(
            412,
            "payload-changed",
            "The plan differs from the one that you were shown or that was proposed. Load it "
            "again.",
        )
    if plan_risk(plan) == Risk.HIGH:
        check_reason(reason, "approves a plan of high risk")
    for member in members:
        check_binding(member, member.evidence_hash)
        check_drift(member, accept_drift=accept_drift, reason=reason)
    missing = max(votes_missing(member, with_vote_of=user) for member in members)
    for member in members:
        if votes_needed(member) > 1:
            vote(member, user, reason=reason)
    actor = Actor.person(user, via=via)
    if missing:
        tell_plan(plan, actor, "voted", reason)
        return plan
    move_plan(
        plan,
        P.APPLYING,
        actor=actor,
        reason=reason,
        decided_by=user,
        decided_at=database_now(),
        decision_reason=reason,
    )
    for member in members:
        go_ahead(member, user, actor, reason=reason)
    return plan


@transaction.atomic
def reject_plan(
    *,
    plan: Plan,
    user: User,
    via: str,
    version: int | None,
    reason: str = "",
    reason_code: str = "",
) -> Plan:
    """Reject all of a plan; each layer then has the cooldown of a rejection."""
    _prepare(plan, user, "reject", version)
    if reason_code in ("", RejectReason.OTHER):
        check_reason(reason, "rejects a plan")
    words = reason_code.replace("_", " ")
    text = f"{words}: {reason}" if words and reason else words or reason
    actor = Actor.person(user, via=via)
    decided: dict[str, Any] = {
        "decided_by": user,
        "decided_at": database_now(),
        "decision_reason": reason,
    }
    move_plan(plan, P.REJECTED, actor=actor, reason=text, outcome=text, **decided)
    for member in members_of(plan):
        transition(
            member,
            AdaptationState.REJECTED,
            actor=actor,
            reason=text,
            rejected_for=reason_code,
            **decided,
        )
    return plan


@transaction.atomic
def take_back_plan(
    *, plan: Plan, user: User, via: str, version: int | None, reason: str = ""
) -> Plan:
    """Take all of a plan back: what was not sent is cancelled, what is applied goes in reverse."""
    _prepare(plan, user, "undo", version)
    check_reason(reason, "undoes a plan")
    actor = Actor.person(user, via=via)
    move_plan(
        plan,
        P.TAKING_BACK,
        actor=actor,
        reason=reason,
        taken_back_by=user,
        outcome=f"{user.get_username()} undid it: {reason}",
        ended_at=None,
    )
    take_back(plan, members_of(plan))
    return plan


def plan_undo_text(plan: Plan) -> list[str]:
    """How it would be taken back, in sentences for the approver."""
    count = plan.members.count()
    return [
        f"The {count} changes are applied one after another, each at the end of a training step "
        "and with a snapshot of its own.",
        "When one of them fails, the rest is not applied, and those that were applied are taken "
        "out again, the last one first. What could not be taken out is named here.",
        "An operator can undo the plan as a whole in the same order. During probation each undo "
        "restores the snapshot, bit by bit; what was kept already is detached.",
        "Each change is tested with the others in the model. The plan is kept or taken back as a "
        "whole: when one change is not kept, the others are taken out too, the last one first.",
    ]


def _prepare(plan: Plan, user: User, act: str, version: int | None) -> None:
    """Lock the run, and refuse who may not do it, or has seen another version."""
    lock_run(plan.run_id)
    plan.refresh_from_db()
    if plan.state == P.AWAITING_APPROVAL:
        advance_plan(plan.uid)  # a member may have expired
        plan.refresh_from_db()
    permission = plan_permissions(plan, user)[act]
    if permission.code == "decision-not-pending":
        raise StalePlanError(plan)
    check_act(permission, plan, f"P-{plan.number}", version)
