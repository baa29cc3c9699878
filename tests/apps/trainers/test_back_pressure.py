"""A trainer that does not pause as it was told is refused before its batch costs anything."""

from __future__ import annotations

import pytest

from apps.accounts.models import User
from apps.rest import codec
from apps.telemetry import back_pressure
from esper.contracts import Role
from tests.apps.callers import Trainer, metrics, register

pytestmark = pytest.mark.django_db


AS_SHIPPED_MS = back_pressure.SLOW_WRITE_MS  # other tests do without this limit


@pytest.fixture(autouse=True)
def _as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(back_pressure, "SLOW_WRITE_MS", AS_SHIPPED_MS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the process, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(back_pressure, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    """Every write is slow."""
    monkeypatch.setattr(back_pressure, "SLOW_WRITE_MS", -1.0)
    real = back_pressure.pause_after
    monkeypatch.setattr(
        "apps.telemetry.services.pause_after", lambda run, elapsed_ms: real(run, elapsed_ms=400.0)
    )


def test_a_trainer_that_ignores_the_pause_is_refused_before_its_body_is_read(
    trainer: Trainer, slow: None, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer.send(metrics=[metrics(1, loss=1.0)])
    assert (first.status, first.data["slow_down_ms"]) == (202, 400)

    parsed = []
    monkeypatch.setattr(codec.StrictJSONParser, "parse", lambda *_, **__: parsed.append(1) or {})
    refused = trainer.send(metrics=[metrics(2, loss=1.0)])
    assert (refused.status, refused.code) == (429, "rate-limited")
    assert refused.header("Retry-After") == "1"
    assert parsed == []


def test_the_pause_ends_and_holds_for_one_run_and_for_telemetry_only(
    trainer: Trainer, people: dict[Role, User], slow: None, clock: list[float]
) -> None:
    other = register(people[Role.RESEARCHER], name="another")
    trainer.send(metrics=[metrics(1, loss=1.0)])
    assert trainer.send(metrics=[metrics(2, loss=1.0)]).status == 429
    assert other.send(metrics=[metrics(1, loss=1.0)]).status == 202
    hello = {"epoch": 1, "step": 2, "applied": []}
    assert trainer.post(f"{trainer.path}/hello", hello).status == 200
    clock[0] += 0.41
    assert trainer.send(metrics=[metrics(3, loss=1.0)]).status == 202


def test_many_runs_at_once_pause_longer_and_never_without_end(clock: list[float]) -> None:
    pauses = [back_pressure.pause_after(f"run{n}", elapsed_ms=400.0) for n in range(20)]
    assert pauses[:3] == [400, 800, 1200]
    assert max(pauses) == back_pressure.PAUSE_MAX_MS
    clock[0] += 60.0
    assert back_pressure.pause_after("run0", elapsed_ms=400.0) == 400
    assert back_pressure.pause_after("run0", elapsed_ms=100.0) == 0
