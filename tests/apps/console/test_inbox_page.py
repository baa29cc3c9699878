"""The approval inbox: badge and list are one query."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from apps.adaptations.models import Adaptation, Snooze
from apps.console.waiting import inbox_count


def badge(text: str) -> int:
    found = re.search(r'id="inbox-count"[^>]*>(\d+)', text)
    assert found is not None
    return int(found[1])


def rows(text: str) -> list[str]:
    return re.findall(r'<tr data-row id="row-(\w+)"', text)


@pytest.mark.parametrize("who", ["vera", "rafi", "olga", "carl", "ada"])
def test_the_badge_counts_what_the_list_shows(world: Any, who: str) -> None:
    text = world.client(who).get("/inbox").content.decode()
    assert badge(text) == len(rows(text)) == 2


def test_an_expired_decision_disappears_from_badge_and_list(world: Any) -> None:
    past = timezone.now() - timedelta(seconds=1)
    Adaptation.objects.filter(pk=world.adaptations["waiting"].pk).update(deadline_at=past)
    text = world.client("olga").get("/inbox").content.decode()
    assert rows(text) == [world.adaptations["olgas"].uid]
    assert badge(text) == inbox_count(world.people["olga"]) == 1


def test_the_next_to_expire_is_first(world: Any) -> None:
    soon = timezone.now() + timedelta(minutes=1)
    Adaptation.objects.filter(pk=world.adaptations["olgas"].pk).update(deadline_at=soon)
    text = world.client("olga").get("/inbox").content.decode()
    assert rows(text)[0] == world.adaptations["olgas"].uid


def test_filters_are_in_the_address(world: Any) -> None:
    uid = world.runs["topics-lm"].uid
    text = world.client("olga").get(f"/inbox?run={uid}").content.decode()
    assert rows(text) == [world.adaptations["olgas"].uid]
    assert rows(world.client("olga").get("/inbox?risk=high").content.decode()) == []


def test_a_claim_shows_under_claimed_and_mine(world: Any) -> None:
    until = timezone.now() + timedelta(minutes=5)
    Adaptation.objects.filter(pk=world.adaptations["waiting"].pk).update(
        claimed_by=world.people["oscar"], claimed_until=until
    )
    olga, oscar = world.client("olga"), world.client("oscar")
    uid = world.adaptations["waiting"].uid
    assert rows(olga.get("/inbox?state=claimed").content.decode()) == [uid]
    assert rows(olga.get("/inbox?state=mine").content.decode()) == []
    assert rows(oscar.get("/inbox?state=mine").content.decode()) == [uid]
    assert len(rows(olga.get("/inbox").content.decode())) == 2


def test_the_history_lists_only_decisions_that_a_person_was_asked_for(world: Any) -> None:
    text = world.client("olga").get("/inbox?state=history").content.decode()
    asked = {world.adaptations[name].uid for name in ("kept", "rejected")}
    assert set(rows(text)) == asked


def test_a_persons_own_run_is_marked(world: Any) -> None:
    text = world.client("olga").get("/inbox").content.decode()
    assert "your own run: another operator has to approve" in text
    assert "your own run" not in world.client("oscar").get("/inbox").content.decode()


def test_what_one_person_snoozes_or_is_assigned_is_in_their_tabs_only(world: Any) -> None:
    uid = world.adaptations["waiting"].uid
    later = timezone.now() + timedelta(minutes=5)
    Snooze.objects.create(
        adaptation=world.adaptations["waiting"], user=world.people["olga"], until=later
    )
    Adaptation.objects.filter(uid=uid).update(
        assigned_to=world.people["oscar"],
        escalated_by=world.people["olga"],
        escalated_reason="unsure",
    )
    seen = {
        (who, tab): uid in rows(world.client(who).get(f"/inbox?state={tab}").content.decode())
        for who in ("olga", "oscar")
        for tab in ("pending", "mine", "snoozed")
    }
    assert {key for key, is_there in seen.items() if is_there} == {
        ("olga", "snoozed"),
        ("oscar", "pending"),
        ("oscar", "mine"),
    }
    text = world.client("olga").get("/inbox").content.decode()
    assert badge(text) == len(rows(text)) == 1


def test_rows_can_be_chosen_where_they_can_be_rejected_and_nowhere_else(world: Any) -> None:
    uid = world.adaptations["waiting"].uid
    text = world.client("olga").get("/inbox").content.decode()
    assert f'data-pick="{uid}"' in text
    assert 'data-act="/api/v1/adaptations/reject"' in text
    for who, address in (("vera", "/inbox"), ("olga", "/inbox?state=history")):
        text = world.client(who).get(address).content.decode()
        assert "data-pick" not in text, (who, address)
        assert "bulk-reject" not in text, (who, address)
