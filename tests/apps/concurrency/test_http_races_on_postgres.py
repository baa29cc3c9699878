"""Two requests at once, through HTTP, on a real PostgreSQL: one effect, and never a 500."""

from __future__ import annotations

import pytest

from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.telemetry.models import Metric
from esper.contracts import Role, TokenScope
from tests.apps.callers import Answer, Caller, Inbox, frame, metrics, register, shown
from tests.apps.cast import make_blueprint, make_person, make_tamiyo, token_of
from tests.apps.concurrency.at_once import answers_at_once

pytestmark = [pytest.mark.postgres, pytest.mark.django_db(transaction=True)]

THREADS = 6


def make_inbox() -> Inbox:
    """A run with telemetry, and Tamiyo; in real transactions there are no shared fixtures."""
    make_blueprint()
    trainer = register(make_person("rafi"))
    trainer.send(frames=[frame(1000)], metrics=[metrics(1000, loss=1.0)])
    return Inbox(trainer, Caller(token_of(make_tamiyo(), TokenScope.DECIDE, TokenScope.READ)))


def operator(name: str) -> str:
    return token_of(make_person(name, Role.OPERATOR), TokenScope.READ, TokenScope.ACT)


def test_one_act_sent_many_times_at_once_is_done_once_and_answered_every_time() -> None:
    adaptation, token = make_inbox().waiting(), operator("olga")
    headers = {"Idempotency-Key": "the very same", "If-Match": f'"{adaptation.version}"'}
    path = f"adaptations/{adaptation.uid}/approve"
    body = {"reason": "yes", **shown(adaptation)}
    answers = answers_at_once(lambda _: Caller(token).post(path, body, **dict(headers)), THREADS)
    assert [answer.status for answer in answers] == [200] * THREADS
    assert {answer.data["version"] for answer in answers} == {answers[0].data["version"]}
    replayed = [answer for answer in answers if answer.header("Idempotency-Replayed")]
    assert len(replayed) == THREADS - 1
    assert AuditEvent.objects.filter(act="adaptation.approved").count() == 1


def test_of_many_people_exactly_one_decides_and_the_others_hear_who() -> None:
    adaptation = make_inbox().waiting()
    tokens = [operator(f"operator{index}") for index in range(THREADS)]

    def decide(index: int) -> Answer:
        act = "approve" if index % 2 else "reject"
        path = f"adaptations/{adaptation.uid}/{act}"
        body = {"reason": "mine"} | (shown(adaptation) if act == "approve" else {})
        return Caller(tokens[index]).act(path, body, version=adaptation.version)

    answers = answers_at_once(decide, THREADS)
    winners = [answer for answer in answers if answer.status == 200]
    losers = [answer for answer in answers if answer.status != 200]
    assert len(winners) == 1
    assert {(loser.status, loser.code) for loser in losers} == {(409, "decision-not-pending")}
    winner = winners[0].data["decided_by"]
    assert {loser.data["decided_by"] for loser in losers} == {winner}


def test_one_proposal_posted_many_times_at_once_is_one_adaptation() -> None:
    inbox = make_inbox()
    answers = answers_at_once(
        lambda _: Inbox(inbox.trainer, Caller(inbox.tamiyo.token)).propose(), THREADS
    )
    assert [answer.status for answer in answers] == [201] * THREADS
    assert {answer.data["uid"] for answer in answers} == {Adaptation.objects.get().uid}


def test_one_batch_sent_many_times_at_once_is_stored_once() -> None:
    trainer = make_inbox().trainer
    batch = trainer.batch(metrics=[metrics(step, loss=1.0) for step in range(2000, 2050)])
    path = f"{trainer.path}/telemetry"
    answers = answers_at_once(lambda _: Caller(trainer.token).post(path, batch), THREADS)
    assert [answer.status for answer in answers] == [202] * THREADS
    assert sorted(answer.data["stored"] for answer in answers) == [0] * (THREADS - 1) + [50]
    assert Metric.objects.filter(step__gte=2000).count() == 50
