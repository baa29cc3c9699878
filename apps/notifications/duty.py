"""Who is on duty: told first of what waits. When nobody answers, everybody is told.

awaiting approval -> channels of those on duty, and of those who always want it
half of the time is over, nobody has claimed it -> ``adaptation.unanswered``, to everybody
"""

from __future__ import annotations

from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import QuerySet
from django.utils import timezone

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.audit.services import record
from apps.notifications.models import DutyShift
from apps.rest.problems import Problem

LONGEST_SHIFT = timedelta(days=14)
KEPT_FOR = timedelta(days=90)


def coming_shifts() -> QuerySet[DutyShift]:
    """Those of now and later, the first to begin first."""
    return DutyShift.objects.filter(ends__gt=timezone.now()).select_related("user")


def on_duty() -> list[DutyShift]:
    """The shifts of this moment, the first to end first."""
    now = coming_shifts().filter(begins__lte=timezone.now(), user__is_active=True)
    return list(now.order_by("ends", "id"))


@transaction.atomic
def add_shift(*, who: User, begins: datetime, ends: datetime, user: User, via: str) -> DutyShift:
    """Put ``who`` on duty: yourself, or as an administrator somebody else.

    Raises:
        Problem: not allowed (403), or a shift that cannot be (422).
    """
    _check(who, user)
    if not may(who, Act.APPROVE).allowed:
        raise Problem(422, "invalid", f"{who.get_username()} may not decide, so duty is no use.")
    if not begins < ends or ends - begins > LONGEST_SHIFT or ends <= timezone.now():
        raise Problem(
            422, "invalid", "A shift ends after it begins, later than now, within 14 days."
        )
    DutyShift.objects.filter(ends__lt=timezone.now() - KEPT_FOR).delete()
    shift = DutyShift.objects.create(user=who, begins=begins, ends=ends)
    _tell(shift, user, via, "duty.added")
    return shift


@transaction.atomic
def remove_shift(*, shift: DutyShift, user: User, via: str) -> None:
    """Raises ``Problem`` 403 for somebody else's shift."""
    _check(shift.user, user)
    _tell(shift, user, via, "duty.removed")
    shift.delete()


def _check(who: User, user: User) -> None:
    permission = may(user, Act.CLAIM if who.pk == user.pk else Act.MANAGE_PEOPLE)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)


def _tell(shift: DutyShift, user: User, via: str, act: str) -> None:
    record(
        actor=Actor.person(user, via=via),
        act=act,
        object_kind="duty",
        object_uid=shift.uid,
        data={
            "who": shift.user.get_username(),
            "begins": shift.begins.isoformat(),
            "ends": shift.ends.isoformat(),
        },
    )
