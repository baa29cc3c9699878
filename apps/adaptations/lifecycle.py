"""The life of an adaptation, and the one function that moves it.

    (proposed) ── by rule ───────────────▶ (approved) ──▶ compile_queued ──▶ compiling ──▶ compiled
        │                                       ▲                                           │   │
        └──▶ awaiting_approval ── by a person ──┘                               declined ◀──┘   │
                 └──▶ rejected, expired,                                                        ▼
                      superseded, cancelled                 probation ◀── accepted ◀── dispatched
                                                             │     │
                 kept ◀──────────────────────────────────────┘     └──▶ rolling_back ──▶ rolled_back
                  ├── a person takes it out ──▶ rolling_back ──▶ reverted
                  ▲                                  │
                  └── the script has merged it ──────┘

States in brackets are passed through: entered and left in one transaction, so that no row rests in
them. They have an audit row, which says who proposed or approved it, and no deadline.

A remedy has no kernel: it goes from approved to dispatched.

Other ends: compile_failed, dispatch_expired, not_applied, apply_failed, rollback_failed, run_lost.
An adaptation is ``in_doubt`` when its trainer has not answered a command before the deadline, or
was started again. A missing answer is no failure: the trainer is asked whether its model holds the
change, and only what the trainer reports settles it. ``rollback_failed`` is what a trainer has
said; it ends when the change is reported to be gone after all. No deadline ever applies anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import F

from apps.accounts.actors import Actor
from apps.adaptations.evidence import evidence_record, seen_at_decision
from apps.adaptations.forfeits import reward_of_undo
from apps.adaptations.models import Adaptation
from apps.adaptations.quarantine import refresh_quarantine
from apps.audit.services import record
from apps.notifications.services import INBOX_TOPIC, SYSTEM_TOPIC, enqueue, publish, run_topic
from apps.policies.selectors import freeze_over
from apps.rest.clock import now as database_now
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.runs.services import lock_run
from esper import tracing
from esper.contracts import (
    ADAPTATION_ENDED,
    ADAPTATION_PASSED_THROUGH,
    AdaptationState,
    SafetyPolicy,
)

S = AdaptationState

# The ends after which a trainer may still report that its model holds the change.
LEAVES_A_REST = frozenset({S.ROLLED_BACK, S.REVERTED, S.NOT_APPLIED, S.APPLY_FAILED, S.RUN_LOST})
NEXT: Mapping[AdaptationState, frozenset[AdaptationState]] = {
    S.PROPOSED: frozenset({S.AWAITING_APPROVAL, S.APPROVED}),
    S.AWAITING_APPROVAL: frozenset({S.APPROVED, S.REJECTED, S.EXPIRED, S.SUPERSEDED, S.CANCELLED}),
    S.APPROVED: frozenset({S.COMPILE_QUEUED, S.DISPATCHED}),
    S.COMPILE_QUEUED: frozenset({S.COMPILING, S.COMPILE_FAILED, S.CANCELLED}),
    S.COMPILING: frozenset({S.COMPILED, S.COMPILE_QUEUED, S.COMPILE_FAILED, S.CANCELLED}),
    S.COMPILED: frozenset({S.DISPATCHED, S.DECLINED, S.DISPATCH_EXPIRED, S.CANCELLED}),
    S.DISPATCHED: frozenset({S.ACCEPTED, S.NOT_APPLIED, S.IN_DOUBT}),
    S.ACCEPTED: frozenset({S.PROBATION, S.APPLY_FAILED, S.NOT_APPLIED, S.IN_DOUBT}),
    S.PROBATION: frozenset({S.KEPT, S.ROLLING_BACK, S.IN_DOUBT, S.RUN_LOST}),
    S.ROLLING_BACK: frozenset(
        # kept: it was merged into its host meanwhile, and cannot be taken out of it any more
        {S.ROLLED_BACK, S.REVERTED, S.ROLLBACK_FAILED, S.IN_DOUBT, S.RUN_LOST, S.KEPT}
    ),
    S.IN_DOUBT: frozenset(
        {
            S.ACCEPTED,
            S.PROBATION,
            S.ROLLING_BACK,
            S.ROLLED_BACK,
            S.REVERTED,
            S.NOT_APPLIED,
            S.APPLY_FAILED,
            S.RUN_LOST,
        }
    ),
    S.KEPT: frozenset({S.ROLLING_BACK, S.REVERTED}),
    S.ROLLBACK_FAILED: frozenset({S.ROLLING_BACK, S.ROLLED_BACK, S.REVERTED}),
    **{state: frozenset() for state in ADAPTATION_ENDED - {S.KEPT, S.ROLLBACK_FAILED}},
    # Something of it came back with a checkpoint, or was applied too late, and cannot be taken out.
    **{state: frozenset({S.ROLLBACK_FAILED}) for state in LEAVES_A_REST},
}


LONGEST_DOUBT_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Deadline:
    """``outcome`` follows ``seconds`` after entering a state; ``policy`` names the threshold."""

    outcome: AdaptationState
    seconds: int = 0
    policy: str = ""

    def length(self, policy: SafetyPolicy) -> timedelta:
        return timedelta(seconds=getattr(policy, self.policy) if self.policy else self.seconds)


# Every state in which an adaptation can wait has one. Where the trainer has a command, a missing
# answer does not say what it did: the outcome is ``in_doubt``.
DEADLINES: Mapping[AdaptationState, Deadline] = {
    S.AWAITING_APPROVAL: Deadline(S.EXPIRED, policy="approval_timeout_seconds"),
    S.COMPILE_QUEUED: Deadline(S.COMPILE_FAILED, 120),
    S.COMPILING: Deadline(S.COMPILE_FAILED, 180),
    S.COMPILED: Deadline(S.DISPATCH_EXPIRED, 120),
    S.DISPATCHED: Deadline(S.IN_DOUBT, policy="dispatch_timeout_seconds"),
    S.ACCEPTED: Deadline(S.IN_DOUBT, 60),
    S.PROBATION: Deadline(S.ROLLING_BACK, policy="probation_timeout_seconds"),
    S.ROLLING_BACK: Deadline(S.IN_DOUBT, 60),
    S.IN_DOUBT: Deadline(S.RUN_LOST, LONGEST_DOUBT_SECONDS),
}


# A member of a plan that is compiled waits until those before it are in the model. Each of them may
# use up the deadlines from compile_queued to accepted, which are about so many of compiled.
TURN_LENGTHS = 5
# A quarantine begins or ends when one of these is entered or left. It goes on during another
# attempt to take the change out.
_QUARANTINING = frozenset({S.ROLLING_BACK, S.IN_DOUBT, S.ROLLBACK_FAILED})
ADVANCE_TASK = "adaptations.advance_plan"


class StaleAdaptationError(Problem):
    """The adaptation has changed since it was read; the error says who decided what, and when."""

    def __init__(self, current: Adaptation) -> None:
        person = current.taken_back_by or current.decided_by
        who = person.get_username() if person else current.decided_rule
        word = AdaptationState(current.state).replace("_", " ")
        deadline = current.deadline_at if current.state == S.AWAITING_APPROVAL else None
        late = deadline is not None and deadline <= database_now()
        super().__init__(
            409,
            "decision-expired" if late or current.state == S.EXPIRED else "decision-not-pending",
            f"The deadline of A-{current.number} has passed."
            if late
            else f"A-{current.number} is {word} already" + (f", decided by {who}." if who else "."),
            state=current.state,
            version=current.version,
            decided_by=who,
            decided_at=current.decided_at.isoformat() if current.decided_at else None,
        )


_AUDITED = (
    "number",
    "layer",
    "kind",
    "blueprint",
    "title",
    "from",
    "to",
    "version",
    "plan",
    "plan_place",
)


def transition(
    adaptation: Adaptation,
    to: AdaptationState,
    *,
    actor: Actor,
    reason: str = "",
    only_if: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Adaptation:
    """Move an adaptation, or raise. Must run inside a transaction.

    The row moves only from the state and version that the caller has read. The audit row and the
    events are written in the same transaction. A passed-through state has no event: the caller
    moves on to the next state before the transaction ends.

    Args:
        only_if: further conditions on the row, checked by the database in the same statement.
        changes: fields that change with the state.

    Raises:
        StaleAdaptationError: the row has moved on, or ``only_if`` does not hold.
        ValueError: the lifecycle has no such transition; a bug in the caller.
    """
    run = lock_run(adaptation.run_id)
    came_from = AdaptationState(adaptation.state)
    if to not in NEXT[came_from]:
        raise ValueError(f"{came_from} -> {to} is not a transition of the lifecycle")
    entered_at = adaptation.changed_at
    changes |= seen_at_decision(adaptation, to)
    changes |= {"state": to, "deadline_at": deadline_for(adaptation, to)}
    if to in (S.ROLLED_BACK, S.REVERTED):
        changes |= reward_of_undo(adaptation)
    if to in ADAPTATION_ENDED:
        changes |= {"ended_at": database_now(), "end_reason": reason, "ended_step": run.step}
    elif came_from in ADAPTATION_ENDED:
        changes |= {"ended_at": None, "ended_step": None}
    _compare_and_set(adaptation, came_from, only_if or {}, changes)
    _announce(adaptation, came_from, actor, reason, decided="decided_evidence" in changes)
    if tracing.is_on():
        transaction.on_commit(lambda: _trace(adaptation, came_from, to, entered_at, actor))
    if to != S.ROLLING_BACK and _QUARANTINING & {came_from, to}:
        refresh_quarantine(run, actor)
    return adaptation


def _trace(
    adaptation: Adaptation,
    came_from: AdaptationState,
    to: AdaptationState,
    entered_at: datetime,
    actor: Actor,
) -> None:
    """The time in the state that was left, as a span; at the first end the adaptation as a whole.

    The actor's kind, and no name: traces are kept by others.
    """
    end, uid = adaptation.changed_at.timestamp(), adaptation.uid
    what: dict[str, Any] = {
        "run": adaptation.run.uid,
        "kind": str(adaptation.kind),
        "change": adaptation.slug,
    }
    tracing.record(
        str(came_from).replace("_", " "),
        adaptation=uid,
        begin=entered_at.timestamp(),
        end=end,
        to=str(to),
        by=str(actor.kind),
        **what,
    )
    if to in ADAPTATION_ENDED and to != S.REVERTED:  # reverted: it had ended as kept
        begin = adaptation.created_at.timestamp()
        tracing.record("adaptation", adaptation=uid, begin=begin, end=end, whole=True,
                       end_state=str(to), **what)  # fmt: skip


def deadline_for(adaptation: Adaptation, state: AdaptationState) -> Any:
    """The deadline of ``state``, entered now; None for an end and a passed-through state."""
    deadline = DEADLINES.get(state)
    if deadline is None:
        return None
    length = deadline.length(adaptation.safety_policy.safety_policy())
    if state == S.COMPILED and adaptation.plan_place:
        length *= 1 + TURN_LENGTHS * adaptation.plan_place
    if state == S.AWAITING_APPROVAL:
        return can_be_approved_from(adaptation.run) + length
    return database_now() + length


def can_be_approved_from(run: Run) -> datetime:
    """From when a decision has time: now, or the end of a freeze, in which nobody can approve."""
    freeze = freeze_over(run.project_id)
    return database_now() if freeze is None else freeze.ends_at


def _compare_and_set(
    adaptation: Adaptation,
    came_from: AdaptationState,
    only_if: Mapping[str, Any],
    changes: dict[str, Any],
) -> None:
    try:
        with transaction.atomic():  # a broken unique index must not spoil the caller's transaction
            count = Adaptation.objects.filter(
                pk=adaptation.pk, state=came_from, version=adaptation.version, **only_if
            ).update(version=F("version") + 1, changed_at=database_now(), **changes)
    except IntegrityError as error:
        raise Problem(
            409,
            "layer-busy",
            f"Another adaptation of {adaptation.layer or 'the run'} is under way; wait for its "
            "end.",
        ) from error
    adaptation.refresh_from_db()
    if not count:
        raise StaleAdaptationError(adaptation)


def _announce(
    adaptation: Adaptation, came_from: AdaptationState, actor: Actor, reason: str, *, decided: bool
) -> None:
    data = {
        "adaptation": adaptation.uid,
        "number": adaptation.number,
        "run": adaptation.run.uid,
        "layer": adaptation.layer,
        "kind": str(adaptation.kind),
        "blueprint": adaptation.slug,
        "title": adaptation.title,
        "from": str(came_from),
        "to": str(adaptation.state),
        "version": adaptation.version,
        "step": adaptation.graft_step or adaptation.proposed_step,
        "by": actor.name,
        "reason": reason,
    }
    if adaptation.plan is not None:
        data |= {"plan": adaptation.plan.uid, "plan_place": adaptation.plan_place}
    record(
        actor=actor,
        act=f"adaptation.{adaptation.state}",
        object_kind="adaptation",
        object_uid=adaptation.uid,
        run_uid=adaptation.run.uid,
        reason=reason,
        data={key: data[key] for key in _AUDITED if key in data}
        | (evidence_record(adaptation) if decided else {}),
    )
    if adaptation.state in ADAPTATION_PASSED_THROUGH:
        return
    if adaptation.plan is not None:  # it may be the turn of another member
        enqueue(task=ADVANCE_TASK, queue="control", args=[adaptation.plan.uid])
    publish(topic=run_topic(adaptation.run.uid), type="adaptation.changed", data=data)
    project = adaptation.run.project_id
    publish(topic=SYSTEM_TOPIC, type="adaptation.changed", data=data, project_id=project)
    approved_by_person = came_from == S.APPROVED and adaptation.decided_by_id is not None
    if S.AWAITING_APPROVAL in (came_from, adaptation.state) or approved_by_person:
        publish(topic=INBOX_TOPIC, type="adaptation.changed", data=data, project_id=project)
