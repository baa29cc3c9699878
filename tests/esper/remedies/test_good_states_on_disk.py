"""Good states outlive the process: a run that goes on from a checkpoint can be rewound."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.exceptions import GraftError
from esper.remedies import GoodStates
from esper.remedies.good_states import CONFIRMED_STEPS, EVERY_STEPS, KEPT
from esper.remedies.state_folder import StateFolder
from tests.esper.remedies.test_catalogue import Run


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine writes slowly."""
    monkeypatch.setattr("esper.remedies.state_folder.CLOSE_SECONDS", 100.0)
    # Nor do the steps of the states depend on what a copy cost.
    monkeypatch.setattr("esper.remedies.good_states.SHARE", math.inf)


def attached(run: Run, folder: Path) -> esper.Session:
    return esper.attach(
        run.model, run.optimizer, mode="supervised", server="", good_states=folder,
        evaluate=lambda: float(run.model.get_parameter("0.weight").detach().square().mean()),
    )  # fmt: skip


def saved(run: Run, session: esper.Session) -> Any:
    return copy.deepcopy((session.state_dict(), run.model.state_dict(), run.optimizer.state_dict()))


def resumed(state: Any, folder: Path) -> tuple[Run, esper.Session]:
    run = Run("adamw")
    session = attached(run, folder)
    session.load_state_dict(state[0])
    run.model.load_state_dict(state[1])
    run.optimizer.load_state_dict(state[2])
    return run, session


@pytest.mark.parametrize("remedy", ["rewind", "restore_best"])
def test_a_resumed_run_goes_back_to_the_same_state_to_the_bit(remedy: str, tmp_path: Path) -> None:
    run = Run("adamw")
    with attached(run, tmp_path) as session:
        run.train(3 * EVERY_STEPS, session)
        state = saved(run, session)
        states = session._parts.surgery.states
        assert states is not None
        steps = states.steps
        expected = session.remedy(remedy).details
        goal = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        moments = copy.deepcopy(run.optimizer.state_dict()["state"])
    later, session = resumed(state, tmp_path)
    with session:
        found = session._parts.surgery.states
        assert found is not None
        assert found.steps == steps
        assert session.remedy(remedy).details == expected
        for name, tensor in later.model.state_dict().items():
            assert torch.equal(tensor, goal[name])
        again = later.optimizer.state_dict()["state"]
        assert all(torch.equal(again[k]["exp_avg"], moments[k]["exp_avg"]) for k in moments)


def test_what_the_run_did_after_the_checkpoint_is_not_offered(tmp_path: Path) -> None:
    run = Run("adamw")
    with attached(run, tmp_path) as session:
        run.train(2 * EVERY_STEPS, session)
        state = saved(run, session)
        run.train(3 * EVERY_STEPS, session)
    _, session = resumed(state, tmp_path)
    with session:
        states = session._parts.surgery.states
        assert states is not None
        assert all(step <= 2 * EVERY_STEPS for step in states.steps)
        (own,) = tmp_path.iterdir()
        assert all(int(f.stem[5:]) <= 2 * EVERY_STEPS for f in own.glob("step-*"))


def test_another_run_in_the_same_folder_finds_nothing(tmp_path: Path) -> None:
    run = Run("adamw")
    with attached(run, tmp_path) as session:
        run.train(2 * EVERY_STEPS, session)
    session = attached(Run("adamw"), tmp_path)
    with session, pytest.raises(GraftError, match="no good state"):
        session.remedy("rewind")


def ring(tmp_path: Path, model: nn.Module) -> tuple[GoodStates, StateFolder]:
    folder = StateFolder(tmp_path)
    return GoodStates(model, lambda: [], folder=folder, clock=lambda: 0.0), folder


def files(folder: StateFolder) -> set[int]:
    folder.close()
    return {int(file.stem[5:]) for file in folder.place.glob("step-*.pt")}


def test_a_sick_run_replaces_no_good_state_and_the_ring_stays_bounded(tmp_path: Path) -> None:
    states, folder = ring(tmp_path, nn.Linear(4, 4))
    for step in range(1, 1001):
        states.on_step(step, healthy=True)
        folder.close()
    before = states.steps
    assert len(before) == KEPT
    assert files(folder) == set(before)
    for step in range(1001, 5001):
        # Healthy for a moment now and then, but never for as long as confirms a state.
        states.on_step(step, healthy=step % CONFIRMED_STEPS == 0)
    assert states.steps == before
    assert files(folder) == set(before)


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    states, folder = ring(blocked, nn.Linear(4, 4))
    with caplog.at_level(logging.WARNING, logger="esper"):
        for step in range(1, 501):
            states.on_step(step, healthy=True)
            folder.close()
    assert len(states.steps) == KEPT
    assert sum("kept in memory only" in record.message for record in caplog.records) == 1


def test_a_damaged_file_is_left_out(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    states, folder = ring(tmp_path, model)
    for step in range(1, 501):
        states.on_step(step, healthy=True)
        folder.close()
    newest = max(files(folder))
    (folder.place / f"step-{newest}.pt").write_bytes(b"cut off")
    found, best = folder.read(model, until=10_000)
    assert [state.step for state in found] == [s for s in states.steps if s != newest]
    assert best is None
    assert math.isfinite(float(found[0].tensors["weight"].sum()))
