"""D8: a script that attaches in each of many short sessions is not slowed by their beginnings."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import esper
from esper.grafting.found_copies import search
from tests.esper.sdk.tiny_training import Training, grafts_at
from tests.esper.sdk.transport.attached import (
    ended,
    final_ack,
    graft_command,
    kernel_for,
    listening,
)
from tests.esper.sdk.transport.control_plane import ControlPlane

SEARCH_SECONDS, STEP_SECONDS = 0.25, 0.01


class Clock:
    """Only the steps and the searches take time, always the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.searches = 100.0, 0
        time = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(search, "time", time)
        monkeypatch.setattr(search.Copies, "_search", lambda *_: self.search())

    def search(self) -> None:
        self.searches += 1
        self.now += SEARCH_SECONDS


def train(steps: int, clock: Clock) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with esper.attach(model, optimizer, mode="automatic", server="", verbose=False) as session:
        for _ in range(steps):
            loss = model(torch.ones(2, 4)).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)
            clock.now += STEP_SECONDS


def test_searches_for_averages_are_a_small_part_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    for _ in range(12):
        train(10, clock)
    assert clock.searches == 1, "the first comes at once"

    clock.now += SEARCH_SECONDS / search.SEARCH_SHARE
    for _ in range(12):
        train(10, clock)
    assert clock.searches == 2


@pytest.fixture
def no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a short session after others: nothing is searched before a graft."""
    time = search.SearchTime()
    time._spent = math.inf
    monkeypatch.setattr(search, "search_time", time)


class Averaged(Training):
    """Its script averages the parameters by name, or has saved them."""

    def __init__(self, *, averages: bool) -> None:
        super().__init__()
        self.averages = averages
        self.shadow = copy.deepcopy(self.model.state_dict())

    def step(self, session: esper.Session | None = None) -> float:
        loss = super().step(session)
        for name, p in self.model.named_parameters() if self.averages else ():
            self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * p.detach()
        return loss


@pytest.mark.usefixtures("no_time_is_left")
@pytest.mark.parametrize("averages", [True, False])
def test_a_graft_of_the_policy_waits_for_what_the_script_writes(averages: bool) -> None:
    training = Averaged(averages=averages)
    with esper.attach(
        training.model, training.optimizer, mode="automatic", server="", verbose=False
    ) as session:
        training.run(3, session)
        local = session._parts.local
        assert local is not None
        local._graft(session._parts.surgery.planned("3", "proj_lora_64", "", {}))
        assert grafts_at(training.model, "3") == []
        training.until(lambda: local._coming is None, session)
        assert grafts_at(training.model, "3") == ([] if averages else ["proj_lora_64"])
        assert not session._parts.failures.counts


@pytest.mark.usefixtures("no_time_is_left")
@pytest.mark.parametrize("averages", [True, False])
def test_so_does_a_graft_of_the_server(plane: ControlPlane, averages: bool) -> None:
    training = Averaged(averages=averages)
    with listening(training, plane) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
    ack = final_ack(plane, 1)
    assert ack["state"] == ("failed" if averages else "applied")
    assert not averages or "keeps an average by hand" in ack["reason"]
