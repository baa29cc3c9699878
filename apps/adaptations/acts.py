"""What people do with an adaptation. Pages, API and command line call these functions."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import F
from django.db.models.functions import Now
from django.utils.translation import gettext as _

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, Permission, may
from apps.adaptations.binding import shown_hash
from apps.adaptations.compile_jobs import queue_compilation
from apps.adaptations.dispatch import request_undo, send_remedy
from apps.adaptations.editing import edit_settings
from apps.adaptations.evidence import evidence_drift, evidence_now
from apps.adaptations.history import why_stopped
from apps.adaptations.lifecycle import StaleAdaptationError, transition
from apps.adaptations.models import Adaptation, Plan
from apps.adaptations.shadows import may_shadow
from apps.adaptations.variants import check_still_admitted
from apps.adaptations.votes import has_voted, vote, votes_missing, votes_needed
from apps.audit.services import record
from apps.blueprints.models import KnownRemedy
from apps.notifications.services import INBOX_TOPIC, publish, run_topic
from apps.policies.selectors import freeze_over
from apps.rest.clock import now as database_now
from apps.rest.etag import required_version
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.runs.services import lock_run
from apps.workers.services import cancel_job
from esper.contracts import (
    RUN_ENDED,
    AdaptationState,
    LayerInfo,
    PlanState,
    RejectReason,
    Risk,
    Role,
)

S = AdaptationState

CLAIM_LENGTH = timedelta(minutes=10)
EXTENSION = timedelta(minutes=5)
MAX_EXTENSIONS = 3
_BEFORE_THE_DEADLINE = {"deadline_at__gt": Now()}  # by the database's clock

MERGED = (
    "The training script has merged this graft into its host's weights, and it cannot be taken "
    "out of them any more."
)

DEADLINE_PASSED = "The deadline has passed. Tamiyo proposes it again while there is a reason."

_ACTS = {
    "approve": (Act.APPROVE, frozenset({S.AWAITING_APPROVAL})),
    "reject": (Act.REJECT, frozenset({S.AWAITING_APPROVAL})),
    "claim": (Act.CLAIM, frozenset({S.AWAITING_APPROVAL})),
    "release": (Act.CLAIM, frozenset({S.AWAITING_APPROVAL})),
    "extend": (Act.EXTEND, frozenset({S.AWAITING_APPROVAL})),
    "assign": (Act.CLAIM, frozenset({S.AWAITING_APPROVAL})),
    "snooze": (Act.CLAIM, frozenset({S.AWAITING_APPROVAL})),
    "escalate": (Act.CLAIM, frozenset({S.AWAITING_APPROVAL})),
    "cancel": (
        Act.CANCEL,
        frozenset({S.AWAITING_APPROVAL, S.COMPILE_QUEUED, S.COMPILING, S.COMPILED}),
    ),
    "rollback": (
        Act.ROLL_BACK,
        frozenset({S.PROBATION, S.KEPT, S.IN_DOUBT, S.ROLLBACK_FAILED}),
    ),
}
# What could still lead to a graft is over with the deadline, whether or not anybody has swept.
_UNTIL_THE_DEADLINE = frozenset({"approve", "claim", "extend", "assign", "snooze", "escalate"})
# While its plan is open; afterwards each member is tested, and may be taken out, by itself.
_DECIDED_AS_A_WHOLE = frozenset(
    {PlanState.AWAITING_APPROVAL, PlanState.APPLYING, PlanState.TAKING_BACK}
)
_STATUS_OF_REFUSAL = {
    "part-of-plan": 409,
    "adaptation-killed": 423,
    "freeze": 409,
    "already-voted": 409,
    "decision-expired": 409,
    "graft-merged": 409,
}


def permissions(adaptation: Adaptation, user: User) -> dict[str, Permission]:
    """For each act: whether this person may do it now, and if not, why."""
    answers = {"shadow": may_shadow(adaptation, user)}
    of_plan = _of_plan(adaptation)
    for name, (act, states) in _ACTS.items():
        if of_plan is not None:
            answers[name] = of_plan
        elif adaptation.state not in states:
            word = adaptation.state.replace("_", " ")
            answers[name] = Permission(False, "decision-not-pending", f"The adaptation is {word}.")
        elif name in _UNTIL_THE_DEADLINE and _too_late(adaptation):
            answers[name] = Permission(False, "decision-expired", DEADLINE_PASSED)
        else:
            answers[name] = may(user, act, of=adaptation.run)
    if adaptation.merged_at is not None and answers["rollback"].allowed:
        answers["rollback"] = Permission(False, "graft-merged", MERGED)
    if answers["approve"].allowed:
        answers["approve"] = may_approve(adaptation, user)
    return answers


def _of_plan(adaptation: Adaptation) -> Permission | None:
    """Why a member is not acted on by itself; None: it is in no plan, or its plan is applied."""
    plan = adaptation.plan
    if plan is None or plan.state not in _DECIDED_AS_A_WHOLE:
        return None
    why = f"It is part of plan P-{plan.number}, which is approved, rejected and undone as a whole."
    return Permission(False, "part-of-plan", why)


def _is_admin(user: User, adaptation: Adaptation) -> bool:
    return user.access.role_in(adaptation.run.project_id) == Role.ADMIN


def may_approve(adaptation: Adaptation, user: User) -> Permission:
    """What stands in the way of an approval beside the person's role."""
    frozen = why_stopped(adaptation, adaptation.run)
    if frozen:
        return Permission(False, "adaptation-killed", f"Nothing can be approved now: {frozen}.")
    freeze = freeze_over(adaptation.run.project_id)
    if freeze is not None:
        return Permission(
            False, "freeze", f"Nothing can be approved now: {freeze.in_words}. You may reject it."
        )
    if adaptation.escalated_by is not None and not _is_admin(user, adaptation):
        name = adaptation.escalated_by.get_username()
        return Permission(
            False, "escalated", f"{name} has escalated it: an admin approves. You may reject it."
        )
    if has_voted(adaptation, user):
        return Permission(
            False, "already-voted", "You have approved it; another person must approve it too."
        )
    return Permission(True)


def approve_adaptation(
    *,
    adaptation: Adaptation,
    user: User,
    via: str,
    version: int | None,
    evidence_hash: str,
    reason: str = "",
    accept_drift: bool = False,
    config: dict[str, Any] | None = None,
) -> Adaptation:
    """Approve an adaptation that waits; queue a graft's compile job, or send the remedy.

    Where the policy wants several people for its risk, it waits until enough have approved.

    Args:
        evidence_hash: of the adaptation that the person was shown; it binds the approval to it.
        config: settings that the person changes before they approve; every gate is checked again.

    Raises:
        GateClosedError: with the changed settings, or by now, a hard gate does not pass (409).
        Problem: not allowed (403), not the adaptation that was shown or proposed (412), decided
            already, too late or claimed by another person (409), proposed to a trainer that was
            started again since (409), the evidence has drifted (409), a setting does not fit
            (422), or adaptation is switched off (423).
    """
    with transaction.atomic():
        prepare_act(adaptation, user, "approve", version)
        check_binding(adaptation, evidence_hash)
        check_claim(adaptation, user)
        if adaptation.risk == Risk.HIGH:
            check_reason(reason, "approves an adaptation of high risk")
        check_drift(adaptation, accept_drift=accept_drift, reason=reason)
        actor = Actor.person(user, via=via)
        _place(adaptation)
        edit_settings(adaptation, config or {}, actor)
        missing = votes_missing(adaptation, with_vote_of=user)
        if votes_needed(adaptation) > 1:
            vote(adaptation, user, reason=reason)
        if missing:
            return note_act(adaptation, user, via, "voted", reason=reason)
        return go_ahead(adaptation, user, actor, reason=reason)


def go_ahead(adaptation: Adaptation, user: User, actor: Actor, *, reason: str) -> Adaptation:
    """Approve what was checked: queue a graft's compile job, or send the remedy.

    Must run inside a transaction. Raises as :func:`approve_adaptation` for a deadline that has
    passed, a layer that the run does not have any more, or a variant that was withdrawn.
    """
    place = _place(adaptation)
    check_still_admitted(adaptation)
    transition(
        adaptation,
        S.APPROVED,
        actor=actor,
        reason=reason,
        only_if=_BEFORE_THE_DEADLINE,
        decided_by=user,
        decided_at=database_now(),
        decision_reason=reason,
    )
    if place is None or adaptation.remedy:
        return send_remedy(adaptation, actor=actor)
    return queue_compilation(adaptation, layer=place, actor=actor)


def _place(adaptation: Adaptation) -> LayerInfo | None:
    """The layer or span of the run as it is now; None: the whole run."""
    if not adaptation.layer:
        return None
    place = adaptation.run.place_of(adaptation.layer, adaptation.since)
    if isinstance(place, str):
        raise Problem(409, "evidence-stale", place)
    return place


@transaction.atomic
def reject_adaptation(
    *,
    adaptation: Adaptation,
    user: User,
    via: str,
    version: int | None,
    reason: str = "",
    reason_code: str = "",
    **_: Any,
) -> Adaptation:
    """Reject an adaptation; works while adaptation is switched off.

    It needs a reason: a code other than ``other``, own words, or both.
    """
    prepare_act(adaptation, user, "reject", version)
    if reason_code in ("", RejectReason.OTHER):
        check_reason(reason, "rejects an adaptation")
    words = reason_code.replace("_", " ") if reason_code else ""
    return transition(
        adaptation,
        S.REJECTED,
        actor=Actor.person(user, via=via),
        reason=f"{words}: {reason}" if words and reason else words or reason,
        decided_by=user,
        decided_at=database_now(),
        decision_reason=reason,
        rejected_for=reason_code,
    )


@transaction.atomic
def cancel_adaptation(
    *, adaptation: Adaptation, user: User, via: str, version: int | None, reason: str = "", **_: Any
) -> Adaptation:
    """Cancel an adaptation that has not been sent to the trainer yet."""
    prepare_act(adaptation, user, "cancel", version)
    if adaptation.job is not None:
        cancel_job(adaptation.job)
    return transition(
        adaptation,
        S.CANCELLED,
        actor=Actor.person(user, via=via),
        reason=reason or "cancelled",
        taken_back_by=user,
        taken_back_reason=reason,
    )


@transaction.atomic
def roll_back_adaptation(
    *, adaptation: Adaptation, user: User, via: str, version: int | None, reason: str, **_: Any
) -> Adaptation:
    """Take it back: from probation by restoring the snapshot, from kept by detaching it."""
    prepare_act(adaptation, user, "rollback", version)
    check_reason(reason, "rolls an adaptation back")
    if adaptation.run.state in RUN_ENDED:
        raise Problem(409, "run-ended", f"The run has {adaptation.run.state}; nothing can change.")
    transition(
        adaptation,
        S.ROLLING_BACK,
        actor=Actor.person(user, via=via),
        reason=reason,
        taken_back_by=user,
        taken_back_reason=reason,
    )
    request_undo(adaptation, reason=reason)
    return adaptation


@transaction.atomic
def claim_adaptation(
    *, adaptation: Adaptation, user: User, via: str, version: int | None, **_: Any
) -> Adaptation:
    """Claim an adaptation for ten minutes, so that others see who is looking at it."""
    prepare_act(adaptation, user, "claim", version)
    check_claim(adaptation, user)
    return note_act(
        adaptation,
        user,
        via,
        "claimed",
        claimed_by=user,
        claimed_until=database_now() + CLAIM_LENGTH,
    )


@transaction.atomic
def release_adaptation(
    *, adaptation: Adaptation, user: User, via: str, version: int | None, **_: Any
) -> Adaptation:
    """Release a claim."""
    prepare_act(adaptation, user, "release", version)
    check_claim(adaptation, user)
    return note_act(adaptation, user, via, "released", claimed_by=None, claimed_until=None)


@transaction.atomic
def extend_adaptation(
    *, adaptation: Adaptation, user: User, via: str, version: int | None, **_: Any
) -> Adaptation:
    """Extend the deadline by five minutes, three times at most."""
    prepare_act(adaptation, user, "extend", version)
    if adaptation.extensions >= MAX_EXTENSIONS:
        raise Problem(
            409, "no-extension-left", f"The deadline was extended {MAX_EXTENSIONS} times already."
        )
    return note_act(
        adaptation,
        user,
        via,
        "extended",
        only_if=_BEFORE_THE_DEADLINE,
        deadline_at=(adaptation.deadline_at or database_now()) + EXTENSION,
        extensions=adaptation.extensions + 1,
    )


def undo_plan(adaptation: Adaptation) -> list[str]:
    """How it would be taken back, in sentences for the approver."""
    layer = adaptation.layer
    if adaptation.remedy:
        return _undo_plan_of_remedy(adaptation)
    if adaptation.merged_at is not None:
        return [MERGED]
    return [
        _(
            "Before the graft the trainer takes a snapshot of weights, buffers, optimizer, "
            "scheduler and random state."
        ),
        _(
            "During probation the trainer can restore %(layer)s from that snapshot, bit by bit; "
            "the host's parameters are never replaced, so names, ties and checkpoints stay valid."
        )
        % {"layer": layer},
        _(
            "When the loss is not finite or blows up, the trainer removes the graft itself within "
            "three steps, also when it cannot reach this server."
        ),
        _(
            "After the graft was kept, an operator can still detach it; %(layer)s then computes "
            "what it would compute without the graft, and keeps what the host has learned "
            "meanwhile."
        )
        % {"layer": layer},
    ]


def _undo_plan_of_remedy(adaptation: Adaptation) -> list[str]:
    known = KnownRemedy.objects.filter(slug=adaptation.remedy).first()
    if known is not None and known.changes_nothing:
        return [_("It changes nothing in the run, so there is nothing to take back.")]
    stays = known is None or known.stays
    ends = (
        _(
            "When it does not help, or after it was kept, it ends: what it does in each step "
            "stops, and the model keeps what it has learned since."
        )
        if stays
        else _(
            "It changes the run once, and nothing of it stays in force: when it does not help, "
            "there is nothing to end."
        )
    )
    return [
        _(
            "Before it the trainer takes a snapshot of weights, buffers, optimizer, scheduler and "
            "random state."
        ),
        _(
            "During probation an operator can take it back exactly: the run is then what it was "
            "before, bit by bit, and forgets what it has learned since."
        ),
        ends,
    ]


def prepare_act(adaptation: Adaptation, user: User, act: str, version: int | None) -> None:
    """Lock the run, and refuse who may not do it, or has seen another version."""
    lock_run(adaptation.run_id)
    adaptation.refresh_from_db()
    permission = permissions(adaptation, user)[act]
    if permission.code == "decision-not-pending":
        raise StaleAdaptationError(adaptation)
    check_act(permission, adaptation, f"A-{adaptation.number}", version)


def check_act(
    permission: Permission, found: Adaptation | Plan, name: str, version: int | None
) -> None:
    """Raises ``Problem``: the act is refused, or 412: the person has seen another version."""
    if not permission.allowed:
        raise _refusal(permission, found.run)
    if required_version(version) != found.version:
        raise Problem(
            412,
            "version-changed",
            f"{name} is at version {found.version}, you saw version {version}. Load it again.",
            version=found.version,
        )


def _refusal(permission: Permission, run: Run) -> Problem:
    """The problem of an act that is refused; of a freeze with its end."""
    status = _STATUS_OF_REFUSAL.get(permission.code, 403)
    freeze = freeze_over(run.project_id) if permission.code == "freeze" else None
    until = {} if freeze is None else {"freeze": freeze.uid, "until": freeze.ends_at.isoformat()}
    return Problem(status, permission.code, permission.why, **until)


def _too_late(adaptation: Adaptation) -> bool:
    return adaptation.deadline_at is not None and adaptation.deadline_at <= database_now()


def check_drift(adaptation: Adaptation, *, accept_drift: bool, reason: str) -> None:
    """Raises ``Problem`` 409 where the evidence has drifted and the person has not accepted it."""
    drift = evidence_drift(adaptation)
    if drift is None or drift <= 1.0:
        return
    if not accept_drift:
        raise Problem(
            409,
            "evidence-stale",
            f"The evidence has drifted by {drift:.0%} of the tolerance since the proposal. "
            "Look at the new numbers before you approve.",
            drift=drift,
            evidence_now=evidence_now(adaptation),
        )
    check_reason(reason, "approves in spite of drifted evidence")


def check_binding(adaptation: Adaptation, evidence_hash: str) -> None:
    """What is approved must be what was shown, and that what was proposed to this trainer."""
    if evidence_hash != adaptation.evidence_hash:
        raise Problem(
            412,
            "payload-changed",
            "The adaptation differs from the one that you were shown. Load it again.",
        )
    if shown_hash(adaptation) != adaptation.evidence_hash:
        raise Problem(
            412,
            "payload-changed",
            "The adaptation was changed in the database since it was proposed. Reject it.",
        )
    if adaptation.run_epoch != adaptation.run.epoch:
        raise Problem(
            409,
            "old-epoch",
            "The trainer was started again since the proposal, and its model may differ from the "
            "one that was judged. Reject it; what is still wrong is proposed again.",
            epoch=adaptation.run.epoch,
        )


def check_claim(adaptation: Adaptation, user: User) -> None:
    """Raises ``Problem`` 409 where another person holds the claim."""
    holder, until = adaptation.claimed_by, adaptation.claimed_until
    if holder and holder != user and until and until > database_now():
        raise Problem(
            409,
            "claim-held",
            f"{holder.get_username()} has claimed it until {until:%H:%M:%S} UTC.",
            claimed_by=holder.get_username(),
            claimed_until=until.isoformat(),
        )


def check_reason(reason: str, verb: str) -> None:
    """Raises ``Problem`` 422 where the reason is empty."""
    if not reason.strip():
        raise Problem(422, "reason-required", f"Give a reason: whoever {verb} must give one.")


def note_act(
    adaptation: Adaptation,
    user: User,
    via: str,
    word: str,
    *,
    reason: str = "",
    data: Mapping[str, Any] | None = None,
    only_if: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Adaptation:
    """Change fields without changing the state; ``data`` is for the audit log and the event."""
    count = Adaptation.objects.filter(
        pk=adaptation.pk,
        state=adaptation.state,
        version=adaptation.version,
        **(only_if or {}),
    ).update(version=F("version") + 1, **changes)
    adaptation.refresh_from_db()
    if not count:
        raise StaleAdaptationError(adaptation)
    record(
        actor=Actor.person(user, via=via),
        act=f"adaptation.{word}",
        object_kind="adaptation",
        object_uid=adaptation.uid,
        run_uid=adaptation.run.uid,
        reason=reason,
        data=dict(data or {}),
    )
    told = {
        "adaptation": adaptation.uid,
        "number": adaptation.number,
        "title": adaptation.title,
        "by": user.get_username(),
        "reason": reason,
        **(data or {}),
    }
    for topic in (INBOX_TOPIC, run_topic(adaptation.run.uid)):
        publish(
            topic=topic,
            type=f"adaptation.{word}",
            data=told,
            project_id=adaptation.run.project_id,
        )
    return adaptation
