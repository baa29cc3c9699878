"""The duty list: who is told first, and everybody when nobody answers."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from apps.adaptations.services import claim_adaptation, sweep
from apps.audit.models import AuditEvent
from apps.notifications.channels import add_channel, plan_deliveries
from apps.notifications.duty import add_shift, on_duty
from apps.notifications.models import Channel, Delivery, DutyShift
from apps.rest.problems import Problem
from esper.contracts import TokenScope
from tests.apps.callers import Caller
from tests.apps.cast import make_person, token_of
from tests.apps.stage import Stage

pytestmark = pytest.mark.django_db
WAITS = "adaptation.awaiting_approval"
HOUR = timedelta(hours=1)


def channel(owner: User, *, only_on_duty: bool = True) -> Channel:
    return add_channel(
        owner=owner,
        via="",
        kind="slack",
        target=f"https://hooks.example.org/{owner.pk}",
        events=[WAITS, "adaptation.unanswered", "switch.killed"],
        quiet_from=None,
        quiet_until=None,
        site="http://testserver",
        only_on_duty=only_on_duty,
    )[0]


def shift(who: User, begins: timedelta = -HOUR, ends: timedelta = HOUR) -> DutyShift:
    now = timezone.now()
    return add_shift(who=who, begins=now + begins, ends=now + ends, user=who, via="session")


def told(type: str, **data: Any) -> set[str]:
    rows = plan_deliveries(type, data)
    return {row.channel.owner.get_username() for row in rows}


def test_who_is_on_duty_is_told_and_with_nobody_on_duty_everybody(stage: Stage) -> None:
    channel(stage.operator)
    channel(stage.second)
    channel(stage.owner, only_on_duty=False)
    assert told("adaptation.changed", to="awaiting_approval") == {"olga", "oscar", "rafi"}
    mine = shift(stage.second)
    shift(stage.operator, begins=HOUR, ends=2 * HOUR)  # later
    assert told("adaptation.changed", to="awaiting_approval") == {"oscar", "rafi"}
    assert told("switch.killed") == {"olga", "oscar", "rafi"}  # never held back
    assert told("adaptation.unanswered") == {"olga", "oscar", "rafi"}
    User.objects.filter(pk=stage.second.pk).update(is_active=False)
    assert on_duty() == []
    User.objects.filter(pk=stage.second.pk).update(is_active=True)
    DutyShift.objects.filter(pk=mine.pk).update(ends=timezone.now())
    assert told("adaptation.changed", to="awaiting_approval") == {"olga", "oscar", "rafi"}


def test_what_nobody_has_claimed_at_half_time_is_told_to_everybody_once(stage: Stage) -> None:
    channel(stage.operator)
    shift(stage.second)
    adaptation = stage.waiting()
    assert adaptation.deadline_at is not None
    sweep()
    assert not Delivery.objects.filter(type="adaptation.unanswered").exists()
    whole = adaptation.deadline_at - timezone.now()
    Adaptation.objects.filter(pk=adaptation.pk).update(deadline_at=timezone.now() + whole * 0.4)
    sweep()
    sweep()
    row = Delivery.objects.get(type="adaptation.unanswered")
    assert row.data["adaptation"] == adaptation.uid


def test_what_somebody_has_claimed_is_answered(stage: Stage) -> None:
    channel(stage.operator)
    adaptation = stage.waiting()
    claim_adaptation(adaptation=adaptation, user=stage.operator, via="", version=adaptation.version)
    soon = timezone.now() + timedelta(minutes=1)
    Adaptation.objects.filter(pk=adaptation.pk).update(deadline_at=soon)
    sweep()
    assert not Delivery.objects.filter(type="adaptation.unanswered").exists()


def test_people_take_shifts_of_their_own_and_administrators_those_of_others(stage: Stage) -> None:
    operator = Caller(token_of(stage.operator, TokenScope.ACT))
    admin = Caller(token_of(make_person("ada"), TokenScope.ACT))
    viewer = Caller(token_of(stage.viewer, TokenScope.ACT))
    now = timezone.now()
    times = {"begins": now.isoformat(), "ends": (now + HOUR).isoformat()}
    mine = operator.post("duty", times)
    assert (mine.status, mine.data["who"]) == (201, "olga")
    assert operator.post("duty", {**times, "who": "oscar"}).status == 403
    theirs = admin.post("duty", {**times, "who": "oscar"})
    assert theirs.status == 201
    assert viewer.post("duty", times).status == 403
    assert admin.post("duty", {**times, "who": "vera"}).status == 422  # she may not decide
    assert admin.post("duty", {**times, "who": "nobody"}).status == 422
    assert {row["who"] for row in viewer.get("duty").data["results"]} == {"olga", "oscar"}
    assert operator.delete(f"duty/{theirs.data['uid']}").status == 403
    assert operator.delete(f"duty/{mine.data['uid']}").status == 204
    assert set(AuditEvent.objects.filter(object_kind="duty").values_list("act", flat=True)) == {
        "duty.added",
        "duty.removed",
    }


@pytest.mark.parametrize(
    ("begins", "ends"),
    [(HOUR, HOUR), (-2 * HOUR, -HOUR), (timedelta(), timedelta(days=15))],
    ids=["no length", "over", "too long"],
)
def test_a_shift_that_cannot_be_is_refused(
    stage: Stage, begins: timedelta, ends: timedelta
) -> None:
    with pytest.raises(Problem) as refused:
        shift(stage.operator, begins, ends)
    assert refused.value.status == 422
