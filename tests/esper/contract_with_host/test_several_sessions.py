"""Several sessions of one model, and grafts by ``esper.graft``: each takes out what is in it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import Session
from esper.contracts import AdaptationState
from esper.exceptions import UndoError
from esper.grafting import Receipt
from esper.grafting.companions.companion import companions_of

MODES = ["observe", "supervised"]


class Script:
    """A model in training; ``steps`` of one session at a time."""

    def __init__(self, mode: str) -> None:
        torch.manual_seed(0)
        self.mode = mode
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)

    def attach(self, **options: Any) -> Session:
        options = {"mode": self.mode, "verbose": False, **options}
        session = esper.attach(self.model, self.optimizer, **options)
        self.train(session)
        return session

    def train(self, session: Session, steps: int = 2) -> None:
        for _ in range(steps):
            loss = self.model(torch.ones(4, 8)).square().mean()
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            session.step(loss)

    @property
    def left(self) -> list[str]:
        return [name for name, _ in self.model.named_modules() if "esper." in name]


def second_attach(script: Script, first: Session) -> Session:
    return script.attach(run="again")


def closed_before(script: Script, first: Session) -> Session:
    first.close()
    return script.attach(run="again")


def detached_before(script: Script, first: Session) -> Session:
    first.detach()
    return script.attach(run="again")


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("again", [second_attach, closed_before, detached_before])
def test_a_session_takes_out_the_graft_of_an_earlier_one(
    again: Callable[[Script, Session], Session], mode: str, hard: bool
) -> None:
    script = Script(mode)
    first = script.attach()
    before = {name: value.clone() for name, value in script.model.state_dict().items()}
    receipt = first.graft("0", "mlp_gelu_2048")
    script.train(first)
    later = again(script, first)
    own = later.graft("2", "proj_lora_64")
    script.train(later)

    report = later.undo(receipt, hard=hard)

    assert not receipt.present
    assert report.exact is hard
    assert [entry.state for entry in first.adaptations] == [AdaptationState.REVERTED]
    if hard:  # the state before is restored, which had no later graft either
        after = script.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert [entry.state for entry in later.adaptations] == [AdaptationState.REVERTED]
    else:
        assert own.present
        later.undo(own)
    script.train(later)
    assert script.left == []
    assert later.findings() == []
    with pytest.raises(UndoError, match="not in the model any more"):
        later.undo(receipt)


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("by", ["the session", "its receipt"])
@pytest.mark.parametrize("mode", MODES)
def test_a_graft_from_before_attach_is_taken_out(mode: str, by: str) -> None:
    script = Script(mode)
    receipt = esper.graft(
        script.model, "0", "mlp_gelu_2048", optimizer=script.optimizer, sample=torch.ones(4, 8)
    )
    session = script.attach()
    own = session.graft("2", "proj_lora_64")
    script.train(session)

    report = session.undo(receipt) if by == "the session" else receipt.undo()

    assert report.exact
    assert report.discarded == ("2/proj_lora_64",)
    assert [entry.state for entry in session.adaptations] == [AdaptationState.REVERTED]
    assert not own.present
    script.train(session)
    assert session.findings() == []
    fresh: Receipt = session.graft("2", "proj_lora_64")
    assert session.undo(fresh).exact


def test_what_trained_a_graft_that_was_taken_out_stays_away() -> None:
    """The hard undo of a later graft brings back the state in which it was there."""
    script = Script("observe")
    session = script.attach()
    older = session.graft("0", "mlp_gelu_2048")
    script.train(session)
    later = session.graft("2", "proj_lora_64")
    session.undo(older, hard=False)
    session.undo(later)

    assert script.left == []
    assert companions_of(script.optimizer) == ()
    assert session.findings() == []


def test_the_receipt_of_another_model_says_how_it_is_taken_out() -> None:
    """Two models share a layer, so its graft is in both."""
    script, other = Script("observe"), Script("observe")
    other.model[0] = script.model[0]
    first, second = script.attach(), other.attach()
    receipt = first.graft("0", "mlp_gelu_2048")

    with pytest.raises(UndoError, match=r"another session .* receipt\.undo\(\) takes it out"):
        second.undo(receipt)

    assert receipt.present
    assert receipt.undo().exact


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_a_graft_without_a_session_leaves_nothing_behind(hard: bool) -> None:
    script = Script("observe")
    names = [name for name, _ in script.model.named_modules()]
    kept = [
        esper.graft(script.model, layer, slug, optimizer=script.optimizer)
        for layer, slug in (("0", "proj_ia3"), ("0", "proj_lora_64"), ("2", "proj_lora_64"))
    ]
    for receipt in reversed(kept):
        receipt.undo(hard=hard)

    assert [name for name, _ in script.model.named_modules()] == names


@pytest.mark.parametrize("end", ["closed", "dropped", "grafted"])
@pytest.mark.parametrize("mode", ["observe", "supervised", "automatic"])
def test_a_large_run_leaves_no_memory_to_the_next_one(
    mode: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a search over many trainings, which end before Python collects what is left."""
    monkeypatch.setattr("esper.sdk.session.LARGE_PARAMETERS", 100)

    def train_one() -> list[weakref.ref[Any]]:
        script = Script(mode)
        session = script.attach()
        script.train(session, 8)
        if end == "grafted":
            session.graft("0", "proj_lora_64")
            script.train(session, 3)
        if end != "dropped":
            session.close()
        return [weakref.ref(script.model), weakref.ref(script.optimizer)]

    gc.disable()
    try:
        left = [ref() for ref in train_one()]
    finally:
        gc.enable()
    assert left == [None, None]
