"""The fixtures that all tests of the Django apps share."""

from __future__ import annotations

import math
from typing import Any

import pytest
from django.core.cache import cache

from apps.accounts.models import User
from apps.blueprints.models import Blueprint
from apps.notifications import fan_out
from apps.telemetry import back_pressure
from apps.telemetry import services as telemetry
from apps.trainers import consumers as trainer_side
from esper.contracts import Role, TokenScope
from tests.apps.callers import Caller, Inbox, Trainer, frame, metrics, register
from tests.apps.cast import NAMES, make_blueprint, make_person, make_tamiyo, token_of
from tests.apps.stage import Stage, make_stage


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: Any) -> None:
    """Tests with real transactions empty their tables afterwards, which the audit log refuses.

    The triggers are put back where they are what is tested.
    """
    from django.db import connection

    from apps.audit import triggers

    with django_db_blocker.unblock():
        triggers.remove(connection)


@pytest.fixture(autouse=True)
def _fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Throttles and coalescing keep state across requests; each test starts without it.

    A busy machine would ask for a pause between two batches, so no write is slow here.
    """
    cache.clear()
    telemetry._progress_sent_at.clear()
    back_pressure.forget()
    monkeypatch.setattr(back_pressure, "SLOW_WRITE_MS", math.inf)


@pytest.fixture(autouse=True)
def _no_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine one would come between a question and its answer; some tests want them."""
    monkeypatch.setattr(trainer_side, "PING_SECONDS", 3600.0)
    monkeypatch.setattr(fan_out, "PING_SECONDS", 3600.0)


@pytest.fixture
def people(db: None) -> dict[Role, User]:
    """The demo's people, one for each role."""
    return {role: make_person(name) for role, name in NAMES.items()}


@pytest.fixture
def callers(people: dict[Role, User]) -> dict[Role, Caller]:
    """Each person's token that may do what the person may."""
    return {
        role: Caller(token_of(user, TokenScope.READ, TokenScope.ACT))
        for role, user in people.items()
    }


@pytest.fixture
def operator(callers: dict[Role, Caller]) -> Caller:
    return callers[Role.OPERATOR]


@pytest.fixture
def viewer(callers: dict[Role, Caller]) -> Caller:
    return callers[Role.VIEWER]


@pytest.fixture
def anybody() -> Caller:
    return Caller("")


@pytest.fixture
def trainer(people: dict[Role, User]) -> Trainer:
    return register(people[Role.RESEARCHER])


@pytest.fixture
def tamiyo(db: None) -> Caller:
    return Caller(token_of(make_tamiyo(), TokenScope.DECIDE, TokenScope.READ))


@pytest.fixture
def stage(db: None) -> Stage:
    """A run with its people, which the test moves through the life of an adaptation."""
    return make_stage()


@pytest.fixture
def blueprint(db: None) -> Blueprint:
    return make_blueprint()


@pytest.fixture
def inbox(trainer: Trainer, tamiyo: Caller, blueprint: Blueprint) -> Inbox:
    sent = trainer.send(frames=[frame(1000)], metrics=[metrics(1000, loss=1.0)])
    assert sent.status == 202, sent.data
    return Inbox(trainer, tamiyo)
