"""What the server adds to the stream is what Tamiyo reads from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from django.db import connection

from apps.accounts.models import User
from esper.contracts import SIGNALS, Role
from esper.contracts.protocol import FRAMES_OF_ENTRY
from esper.services.tamiyo import stream
from tests.apps.callers import Trainer, frame, layer, metrics, register


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Entries as they would be added, one for each batch."""
    entries: list[dict[str, Any]] = []
    monkeypatch.setattr("apps.telemetry.services.add_batch", entries.append)
    return entries


def as_read(entry: dict[str, Any]) -> dict[bytes, bytes]:
    return {
        name.encode(): value if isinstance(value, bytes) else str(value).encode()
        for name, value in entry.items()
    }


@pytest.mark.django_db(transaction=True)
def test_tamiyo_reads_the_newest_frames_of_a_batch(
    trainer: Trainer, added: list[dict[str, Any]]
) -> None:
    steps = range(10, 10 * (FRAMES_OF_ENTRY + 3), 10)
    frames = [{**frame(step, value=step), "loss": step / 2} for step in steps]
    frames[-1]["loss"] = "nan"
    del frames[-2]["loss"]
    assert trainer.send(frames=frames, metrics=[metrics(1, loss=9.0)]).status == 202
    (entry,) = added
    found = stream._parse(b"1700000000123-4", as_read(entry))
    assert found is not None
    assert [one.step for one in found] == list(steps)[-FRAMES_OF_ENTRY:]
    assert {(one.run, one.epoch, one.stored_at) for one in found} == {
        (trainer.run, 1, 1700000000.123)
    }
    assert [one.loss for one in found[:2]] == [found[0].step / 2, found[1].step / 2]
    assert found[-2].loss == found[-3].step / 2  # the newest one that the batch holds up to then
    assert found[-1].loss is not None
    assert np.isnan(found[-1].loss)
    assert found[-1].values == np.full((2, len(SIGNALS)), found[-1].step, dtype="<f4").tobytes()


@pytest.mark.parametrize("field", ["frames", "steps", "wall_times", "losses", "values"])
@pytest.mark.django_db(transaction=True)
def test_an_entry_that_does_not_fit_together_is_left_out(
    trainer: Trainer, added: list[dict[str, Any]], field: str
) -> None:
    trainer.send(frames=[frame(1), frame(2), frame(3)])
    fields = as_read(added[0])
    assert stream._parse(b"1-1", fields) is not None
    cut = {"frames": b"2", "values": fields[b"values"][:-1]}.get(field, b"1,2")
    assert stream._parse(b"1-1", {**fields, field.encode(): cut}) is None


@pytest.mark.django_db(transaction=True)
def test_a_batch_of_a_huge_model_does_not_read_its_layers(
    people: dict[Role, User], django_assert_max_num_queries: Any
) -> None:
    layers = [layer(f"layer{index}") for index in range(50)]
    trainer = register(people[Role.RESEARCHER], layers=layers)
    trainer.send(frames=[frame(1, layers=50)])
    with django_assert_max_num_queries(20), connection.execute_wrapper(_refuse_layers):
        assert trainer.send(frames=[frame(2, layers=50)]).status == 202


def _refuse_layers(execute: Any, sql: str, *rest: Any) -> Any:
    assert '"runs_run"."layers"' not in sql, sql
    return execute(sql, *rest)
