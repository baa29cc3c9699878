"""Passing a decision to another person, to an admin, or to one's own later self."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from django.db import transaction

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.accounts.policy import ALLOWED, Act, may
from apps.accounts.projects import people_with
from apps.adaptations.acts import check_reason, note_act, prepare_act
from apps.adaptations.models import Adaptation, Snooze
from apps.audit.services import record
from apps.rest.clock import now as database_now
from apps.rest.problems import Problem
from esper.contracts import Role


def approvers_of(adaptation: Adaptation) -> list[User]:
    """Active people who may approve for this run, by name."""
    escalated = adaptation.escalated_by_id is not None
    roles = {Role.ADMIN} if escalated else ALLOWED[Act.APPROVE]
    people = people_with(roles, adaptation.run.project_id)
    return list(people.exclude(pk=adaptation.run.owner_id).order_by("username"))


@transaction.atomic
def assign_adaptation(
    *,
    adaptation: Adaptation,
    user: User,
    via: str,
    version: int | None,
    to: str,
    reason: str = "",
    **_: Any,
) -> Adaptation:
    """Ask one person to decide; an empty name takes the request back. Others may still decide.

    Raises:
        Problem: not allowed, or this person may not approve for this run (422).
    """
    prepare_act(adaptation, user, "assign", version)
    person = None
    if to:
        person = User.objects.filter(username=to, is_active=True).first()
        if person is None:
            raise Problem(422, "invalid", f"There is no active account called {to!r}.")
        permission = may(person, Act.APPROVE, of=adaptation.run)
        if not permission.allowed:
            names = ", ".join(p.get_username() for p in approvers_of(adaptation)) or "nobody"
            raise Problem(422, "invalid", f"{to} may not approve it. Who may: {names}.")
    return note_act(
        adaptation, user, via, "assigned", reason=reason, data={"to": to}, assigned_to=person
    )


@transaction.atomic
def escalate_adaptation(
    *,
    adaptation: Adaptation,
    user: User,
    via: str,
    version: int | None,
    reason: str = "",
    **_: Any,
) -> Adaptation:
    """Leave the approval to an admin. Rejecting stays open to all who could before.

    Raises:
        Problem: not allowed, no reason (422), escalated already (409), or no admin could approve
            it (422).
    """
    prepare_act(adaptation, user, "escalate", version)
    check_reason(reason, "escalates a decision")
    if adaptation.escalated_by is not None:
        name = adaptation.escalated_by.get_username()
        raise Problem(409, "already-escalated", f"{name} has escalated it already.")
    admins = people_with({Role.ADMIN}, adaptation.run.project_id)
    if not admins.exclude(pk=adaptation.run.owner_id).exists():
        raise Problem(422, "quorum-unreachable", "There is no admin who may approve it.")
    return note_act(
        adaptation,
        user,
        via,
        "escalated",
        reason=reason,
        escalated_by=user,
        escalated_reason=reason,
        assigned_to=None,
    )


def snoozed_until(adaptation: Adaptation, user: User) -> datetime | None:
    """Until when this person has hidden it; None where it is in their inbox."""
    asleep = Snooze.objects.filter(adaptation=adaptation, user=user, until__gt=database_now())
    return asleep.values_list("until", flat=True).first()


@transaction.atomic
def snooze_adaptation(
    *, adaptation: Adaptation, user: User, via: str, minutes: int, **_: Any
) -> Adaptation:
    """Hide it from one's own inbox for some minutes; 0 shows it again. Others still see it.

    Raises:
        Problem: not allowed, or it would expire meanwhile (422).
    """
    prepare_act(adaptation, user, "snooze", adaptation.version)  # the row does not change
    until = database_now() + timedelta(minutes=minutes)
    if adaptation.deadline_at is not None and until >= adaptation.deadline_at:
        left = int((adaptation.deadline_at - database_now()).total_seconds() // 60)
        raise Problem(
            422, "invalid", f"It expires in {left} min: snooze it for less, or extend it."
        )
    if minutes:
        Snooze.objects.update_or_create(adaptation=adaptation, user=user, defaults={"until": until})
    else:
        Snooze.objects.filter(adaptation=adaptation, user=user).delete()
    record(
        actor=Actor.person(user, via=via),
        act="adaptation.snoozed",
        object_kind="adaptation",
        object_uid=adaptation.uid,
        run_uid=adaptation.run.uid,
        data={"minutes": minutes},
    )
    return adaptation
