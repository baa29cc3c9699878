"""People set freezes, and end them before their time.

In a freeze proposals are made and seen, and wait. Nothing is applied: no approval, no rule, no
delegation. What is safe goes on: rejections, undos, pauses, kills, and verdicts on what is in a
model already.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from django.db import transaction

from apps.accounts.actors import Actor
from apps.accounts.models import Project, User
from apps.accounts.policy import Act, may
from apps.accounts.visibility import everything
from apps.audit.services import record
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.policies.models import Freeze
from apps.rest.clock import now as database_now
from apps.rest.problems import Problem
from apps.runs.models import Run
from esper.contracts import RUN_ENDED

LONGEST = timedelta(days=31)
FURTHEST = timedelta(days=366)


@everything()  # all runs in the scope are locked, whoever sees them
@transaction.atomic
def set_freeze(
    *,
    ends_at: datetime,
    reason: str,
    user: User,
    via: str,
    starts_at: datetime | None = None,
    project: Project | None = None,
) -> Freeze:
    """Let nothing be applied from ``starts_at`` (now, where it is None or past) until ``ends_at``.

    Args:
        project: for its runs alone; None: for all runs.

    Raises:
        Problem: not allowed (403), no reason, or times that make no sense (422).
    """
    _check_may(user, project)
    if not reason.strip():
        raise Problem(422, "reason-required", "Say why nothing may be applied: approvers read it.")
    # An approval that is being written is over before the freeze, or sees it.
    _lock_runs(project)
    now = database_now()
    begin = max(now, starts_at) if starts_at is not None else now
    if ends_at <= begin:
        raise Problem(422, "invalid", "A freeze must end after its start, and in the future.")
    if ends_at - begin > LONGEST or begin - now > FURTHEST:
        raise Problem(
            422,
            "invalid",
            f"A freeze lasts {LONGEST.days} days at most, and begins within {FURTHEST.days} days. "
            "The adaptation switch has no end.",
        )
    made = Freeze.objects.create(
        project=project, starts_at=begin, ends_at=ends_at, reason=reason.strip(), set_by=user
    )
    _tell(made, Actor.person(user, via=via), "freeze.set", reason)
    return made


@everything()
@transaction.atomic
def end_freeze(*, freeze: Freeze, user: User, via: str, reason: str = "") -> Freeze:
    """End a freeze before its time, or take back one that has not begun.

    Raises:
        Problem: not allowed (403), or over already (409).
    """
    _check_may(user, freeze.project)
    _lock_runs(freeze.project)
    now = database_now()
    ended = Freeze.objects.filter(pk=freeze.pk, ended_at=None, ends_at__gt=now).update(
        ended_at=now, ended_by=user, end_reason=reason
    )
    freeze.refresh_from_db()
    if not ended:
        raise Problem(409, "freeze-over", "The freeze is over already.")
    _tell(freeze, Actor.person(user, via=via), "freeze.ended", reason)
    return freeze


def _check_may(user: User, project: Project | None) -> None:
    permission = may(user, Act.EDIT_POLICY, of=project)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)


def _lock_runs(project: Project | None) -> None:
    """The live ones, in the order in which everything locks them."""
    live = Run.objects.exclude(state__in=RUN_ENDED)
    place = live if project is None else live.filter(project=project)
    list(place.order_by("pk").select_for_update().values_list("pk", flat=True))


def _tell(freeze: Freeze, actor: Actor, act: str, reason: str) -> None:
    data = {
        "freeze": freeze.uid,
        "where": freeze.where,
        "starts_at": freeze.starts_at.isoformat(),
        "ends_at": freeze.ends_at.isoformat(),
    }
    record(
        actor=actor,
        act=act,
        object_kind="freeze" if freeze.project is None else "project",
        object_uid=freeze.uid if freeze.project is None else freeze.project.uid,
        reason=reason,
        data=data,
    )
    publish(
        topic=SYSTEM_TOPIC,
        type=act,
        data={**data, "by": actor.name, "reason": reason},
        project_id=freeze.project_id,
    )
