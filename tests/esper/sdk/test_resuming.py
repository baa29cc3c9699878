"""A run that is stopped in the middle of probation goes on as if it never had been."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import esper
from esper.contracts import AdaptationState
from esper.exceptions import ConfigurationError
from esper.grafting import digest, slots
from esper.reward import Look
from tests.esper.sdk.normed_training import NormedTraining
from tests.esper.sdk.tiny_training import Training

IN_A_NEW_PROCESS = """
import sys
import torch
from esper.grafting import digest
from tests.esper.sdk.normed_training import NormedTraining

training = NormedTraining(seed=99)
session = training.resume(torch.load(sys.argv[1], weights_only=True))
print([loss.hex() for loss in training.run(20, session)], digest(training.model))
"""


def on_probation() -> tuple[NormedTraining, esper.Session]:
    """Three grafts of different age, the youngest in front of the oldest, none mature."""
    training = NormedTraining()
    session = training.attach()
    training.run(25, session)
    session.graft("6", "proj_lora_64")
    training.run(4, session)
    session.graft("4", "proj_lora_64")
    training.run(3, session)
    session.graft("1", "ln_rms")
    training.run(9, session)  # warm-up and ramp are both half-way
    return training, session


def saved_and_loaded(training: NormedTraining, session: esper.Session) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(training.checkpoint(session), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)  # type: ignore[no-any-return]


def test_probation_goes_on_in_a_new_process_to_the_bit(tmp_path: Path) -> None:
    training, session = on_probation()
    path = tmp_path / "checkpoint.pt"
    torch.save(training.checkpoint(session), path)
    losses = [loss.hex() for loss in training.run(20, session)]
    expected = f"{losses} {digest(training.model)}"
    answer = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, str(path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
            "ESPER_VERBOSE": "0",
        },
    )
    assert answer.stderr == ""
    assert answer.stdout.strip() == expected


def test_probation_is_remembered_whole() -> None:
    training, session = on_probation()
    session.adaptations[0].looks.append(Look(7, 0.25, 2.0))
    later = NormedTraining(seed=5)
    resumed = later.resume(saved_and_loaded(training, session))
    for mine, theirs in zip(resumed.adaptations, session.adaptations, strict=True):
        assert mine.loss_before == theirs.loss_before
        assert mine.grafted_at == pytest.approx(theirs.grafted_at, abs=5)
        assert (mine.uid, mine.step, mine.state, mine.guarded_until) == (
            theirs.uid, theirs.step, theirs.state, theirs.guarded_until,
        )  # fmt: skip
    assert resumed.adaptations[0].looks == [Look(7, 0.25, 2.0)]
    assert [entry.layer for entry in resumed.adaptations] == ["6", "4", "1"]


def test_the_guard_judges_by_what_it_saw_before_the_stop() -> None:
    training, session = on_probation()
    later = NormedTraining(seed=5)
    resumed = later.resume(saved_and_loaded(training, session))
    later.spoil = lambda loss: loss * 0 + 1e4
    later.run(3, resumed)
    assert resumed.adaptations[-1].state is AdaptationState.ROLLED_BACK


def test_what_the_local_loop_has_learned_is_kept() -> None:
    _, session = on_probation()
    state = session.state_dict()
    state["local"] = {
        "experience": {"proj_lora_64": {"kept": 3, "rolled_back": 1, "mean_reward": 0.5}},
        "grafted_at": [1.0],
        "last": {"6": [25, True]},
    }
    resumed = NormedTraining(seed=5).attach()
    resumed.load_state_dict(state)
    assert resumed.state_dict()["local"] == state["local"]


Change = Callable[[dict[str, Any]], Any]


def _first_graft(state: dict[str, Any]) -> str:
    return next(iter(state["grafts"]))


HOSTILE: dict[str, Change] = {
    "no format": lambda s: s.pop("format"),
    "no guard": lambda s: s.pop("guard"),
    "a step before the first": lambda s: s.update(step=-3),
    "losses of two lengths": lambda s: s["losses"].update(step=torch.zeros(1)),
    "another number of optimizers": lambda s: s["optimizers"].append(None),
    "an unknown blueprint": lambda s: s["structure"][-1].update(blueprint="sudo"),
    "an unknown layer": lambda s: s["structure"][-1]["layer"].update(name="nowhere"),
    "a layer of another kind": lambda s: s["structure"][-1]["layer"].update(kind="Embedding"),
    "a layer of absurd size": lambda s: s["structure"][-1]["layer"].update(features_out=10**12),
    "a graft twice": lambda s: s["structure"].append(s["structure"][0]),
    "a setting that does not exist": lambda s: s["structure"][-1]["config"].update(colour=3),
    "a missing weight": lambda s: s["grafts"].pop(_first_graft(s)),
    "a single number for a weight": lambda s: s["grafts"].update({_first_graft(s): torch.zeros(1)}),
    "a text for a weight": lambda s: s["grafts"].update({_first_graft(s): "x"}),
    "groups of another model": lambda s: s["optimizers"][0]["groups"].pop(),
    "state of an unknown tensor": lambda s: s["optimizers"][0]["state"].update(nowhere={}),
    "moments of another shape": lambda s: s["optimizers"][0]["state"]["0.weight"].update(
        exp_avg=torch.zeros(3)
    ),
    "a text for a learning rate": lambda s: s["optimizers"][0]["groups"][0].update(lr="fast"),
    "a state that does not exist": lambda s: s["applied"][-1].update(state="blessed"),
    "an adaptation without its graft": lambda s: s["applied"][-1].update(layer="0"),
}


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    torch.set_num_threads(1)
    _, session = on_probation()
    return copy.deepcopy(session.state_dict())


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_state_that_does_not_fit_is_refused_before_anything_is_touched(
    good: dict[str, Any], change: Change
) -> None:
    training = NormedTraining(seed=5)
    training.run(3)
    session = training.attach(slots=["0"])  # the others get their slot when they are rebuilt
    before = digest(training.model), copy.deepcopy(training.optimizer.state_dict())
    schedule = copy.deepcopy(training.scheduler.state_dict())
    slotted = {name for name, _, _ in slots(training.model)}
    state = copy.deepcopy(good)
    change(state)
    with pytest.raises(ConfigurationError):
        session.load_state_dict(state)
    assert digest(training.model) == before[0]
    assert _equal(training.optimizer.state_dict(), before[1])
    assert training.scheduler.state_dict() == schedule
    assert {name for name, _, _ in slots(training.model)} == slotted
    assert session.adaptations == ()
    session.load_state_dict(good)
    assert len(session.adaptations) == 3


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("state", [None, [], {}, {"format": 2}, {"format": 1}, {"model": 3}])
def test_what_is_no_state_is_refused(training: Training, state: object) -> None:
    session = esper.attach(training.model, training.optimizer)
    with pytest.raises(ConfigurationError):
        session.load_state_dict(state)
