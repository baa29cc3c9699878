"""The life of a plan after it was proposed:

    awaiting_approval ──▶ applying ──▶ applied ──▶ settled, where every member was kept
        │                    │            │
        │        a member fails or is taken out, or a person undoes it
        ▼                    ▼            ▼
    rejected, expired    taking_back ──▶ taken_back, or incomplete where a part of it stays
    or withdrawn

The verdict that counts is that of the whole. Each member is tested with the others in the model, so
the verdict on one tells nothing of the rest without it: where one is not kept, all of them go.

A plan follows its members: each change of a member's state queues ``advance_plan``, and the
periodic sweep calls it for every open plan, so that a lost message does no harm. It may be called
at any time and any number of times.
"""

from __future__ import annotations

import logging
from typing import Any

from django.db import transaction
from django.db.models import F

from apps.accounts.actors import SYSTEM, Actor
from apps.adaptations.compile_jobs import queue_dispatch
from apps.adaptations.dispatch import request_undo
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation, Plan
from apps.adaptations.turns import IN_THE_MODEL, its_turn
from apps.audit.services import record
from apps.notifications.services import INBOX_TOPIC, publish, run_topic
from apps.rest.clock import now as database_now
from apps.rest.problems import Problem
from apps.runs.services import lock_run
from apps.workers.services import cancel_job
from esper.contracts import ADAPTATION_ENDED, PLAN_ENDED, AdaptationState, PlanState

log = logging.getLogger(__name__)

S = AdaptationState
_NOT_SENT = (S.COMPILE_QUEUED, S.COMPILING, S.COMPILED)
_AT_THE_TRAINER = (S.DISPATCHED, S.ACCEPTED, S.ROLLING_BACK, S.IN_DOUBT)


class StalePlanError(Problem):
    """The plan has changed since it was read."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(
            409,
            "decision-not-pending",
            f"P-{plan.number} is {plan.state.replace('_', ' ')} already.",
            state=plan.state,
            version=plan.version,
        )


def move_plan(plan: Plan, to: PlanState, *, actor: Actor, reason: str = "", **changes: Any) -> Plan:
    """Move a plan from the state and version that the caller has read. In a transaction.

    Raises:
        StalePlanError: it has moved on.
    """
    came_from = plan.state
    if to in PLAN_ENDED:
        changes["ended_at"] = database_now()
    count = Plan.objects.filter(pk=plan.pk, state=came_from, version=plan.version).update(
        state=to, version=F("version") + 1, changed_at=database_now(), **changes
    )
    plan.refresh_from_db()
    if not count:
        raise StalePlanError(plan)
    tell_plan(plan, actor, str(to), reason, came_from=came_from)
    return plan


def tell_plan(plan: Plan, actor: Actor, act: str, reason: str = "", *, came_from: str = "") -> None:
    """Write the audit row and the events of something that was done to a plan."""
    members = list(plan.members.order_by("plan_place").values_list("uid", flat=True))
    data = {
        "plan": plan.uid,
        "number": plan.number,
        "title": plan.title,
        "members": members,
        "evidence_hash": plan.evidence_hash,
        "from": came_from,
        "to": str(plan.state),
        "version": plan.version,
    }
    record(
        actor=actor,
        act=f"plan.{act}",
        object_kind="plan",
        object_uid=plan.uid,
        run_uid=plan.run.uid,
        reason=reason,
        data=data,
    )
    told = {**data, "by": actor.name, "reason": reason}
    for topic in (INBOX_TOPIC, run_topic(plan.run.uid)):
        publish(topic=topic, type="plan.changed", data=told, project_id=plan.run.project_id)


def advance_plans() -> None:
    """Advance every open plan."""
    for uid in Plan.objects.exclude(state__in=PLAN_ENDED).values_list("uid", flat=True):
        try:
            advance_plan(uid)
        except Problem as error:  # a person or a report has moved it meanwhile
            log.info("plan %s: %s", uid, error)


@transaction.atomic
def advance_plan(uid: str) -> None:
    """Do what follows from the states of a plan's members.

    Raises:
        Problem: a member has moved while this was done; call it again.
    """
    plan = Plan.objects.select_related("run").get(uid=uid)
    lock_run(plan.run_id)
    plan.refresh_from_db()
    members = list(
        plan.members.select_related("run", "blueprint", "safety_policy", "job", "plan").order_by(
            "plan_place"
        )
    )
    match PlanState(plan.state):
        case PlanState.AWAITING_APPROVAL:
            _close_if_a_member_has_ended(plan, members)
        case PlanState.APPLYING:
            _apply_next(plan, members)
        case PlanState.APPLIED:
            _settle(plan, members)
        case PlanState.TAKING_BACK:
            take_back(plan, members)
        case _:
            pass


def _close_if_a_member_has_ended(plan: Plan, members: list[Adaptation]) -> None:
    gone = [member for member in members if member.state != S.AWAITING_APPROVAL]
    if not gone:
        return
    expired = any(member.state == S.EXPIRED for member in gone)
    reason = (
        "nobody decided before the deadline"
        if expired
        else f"A-{gone[0].number} is {gone[0].state.replace('_', ' ')}: {gone[0].end_reason}"
    )
    for member in members:
        if member.state == S.AWAITING_APPROVAL:
            end = S.EXPIRED if expired else S.CANCELLED
            transition(member, end, actor=SYSTEM, reason=f"its plan has ended: {reason}")
    state = PlanState.EXPIRED if expired else PlanState.WITHDRAWN
    move_plan(plan, state, actor=SYSTEM, reason=reason, outcome=_sentence(reason))


def _apply_next(plan: Plan, members: list[Adaptation]) -> None:
    """The next member is sent when those before it are in the model; a failure stops the rest."""
    failed = next((m for m in members if m.state in ADAPTATION_ENDED and m.state != S.KEPT), None)
    if failed is not None:
        why = f": {failed.end_reason}" if failed.end_reason else ""
        reason = f"A-{failed.number} {failed.title} is {failed.state.replace('_', ' ')}{why}"
        move_plan(
            plan, PlanState.TAKING_BACK, actor=SYSTEM, reason=reason, outcome=_sentence(reason)
        )
        take_back(plan, members)
        return
    waiting = next((m for m in members if m.state not in IN_THE_MODEL), None)
    if waiting is None:
        move_plan(plan, PlanState.APPLIED, actor=SYSTEM)
        _settle(plan, members)
    elif waiting.state == S.COMPILED and its_turn(waiting):
        queue_dispatch(waiting)


def _settle(plan: Plan, members: list[Adaptation]) -> None:
    """Kept or taken back as one: the first member that is not kept decides."""
    out = next((member for member in members if member.state not in IN_THE_MODEL), None)
    if out is not None and out.state not in _AT_THE_TRAINER:
        why = f": {out.end_reason}" if out.end_reason else ""
        reason = f"A-{out.number} {out.title} was not kept{why}"
        outcome = f"{_sentence(reason)} So the whole plan is taken back."
        move_plan(plan, PlanState.TAKING_BACK, actor=SYSTEM, reason=reason, outcome=outcome)
        take_back(plan, members)
    elif all(member.state == S.KEPT for member in members):
        outcome = f"All {len(members)} changes were kept, so the plan is kept as a whole."
        move_plan(plan, PlanState.SETTLED, actor=SYSTEM, reason=outcome, outcome=outcome)


def take_back(plan: Plan, members: list[Adaptation]) -> None:
    """Cancel what was not sent, and take out what was applied, the last member first.

    One undo at a time: a snapshot is of the moment before its graft, so the later graft goes
    first. In a transaction.
    """
    why = f"its plan P-{plan.number} is taken back: {plan.outcome}"
    for member in members:
        if member.state in _NOT_SENT:
            if member.job is not None:
                cancel_job(member.job)
            transition(member, S.CANCELLED, actor=SYSTEM, reason=why)
    for member in reversed(members):
        if member.state in _AT_THE_TRAINER:
            return  # its answer advances the plan
        if member.state in IN_THE_MODEL and member.merged_at is None and not plan.run.ended:
            transition(
                member,
                S.ROLLING_BACK,
                actor=SYSTEM,
                reason=why,
                taken_back_by=plan.taken_back_by,
                taken_back_reason=plan.outcome if plan.taken_back_by else "",
            )
            request_undo(member, reason=why)
            return
    _close_taken_back(plan, members)


def _close_taken_back(plan: Plan, members: list[Adaptation]) -> None:
    stays = [m for m in members if m.state in (*IN_THE_MODEL, S.ROLLBACK_FAILED, S.RUN_LOST)]
    if not stays:
        out = sum(m.graft_step is not None for m in members)
        outcome = f"{plan.outcome} {_taken_out(out)}"
        move_plan(plan, PlanState.TAKEN_BACK, actor=SYSTEM, reason=outcome, outcome=outcome)
        return
    names = ", ".join(f"A-{m.number} {m.title} ({m.state.replace('_', ' ')})" for m in stays)
    outcome = f"{plan.outcome} A part of the plan stays in the model: {names}."
    move_plan(plan, PlanState.INCOMPLETE, actor=SYSTEM, reason=outcome, outcome=outcome)


def _taken_out(count: int) -> str:
    if not count:
        return "Nothing of it was applied."
    what = "The change that was" if count == 1 else f"The {count} changes that were"
    return f"{what} applied {'is' if count == 1 else 'are'} out of the model."


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."
