"""What observing costs is counted in calls, which no busy machine changes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.diagnosis import plan
from esper.grafting import optimizers
from esper.sdk import idle_steps
from esper.sdk.run_state import LOSSES_KEPT

OWN = os.path.dirname(esper.__file__) + os.sep
PERIOD = 160  # steps between two frames, and between two looks


@contextmanager
def calls(inside: str = "") -> Iterator[list[int]]:
    """Counts the calls that are made; ``inside``: of functions whose file begins so."""
    found = [0]

    def count(frame: FrameType, event: str, _: Any) -> None:
        is_own = event == "call" and frame.f_code.co_filename.startswith(inside)
        found[0] += is_own or (event == "c_call" and not inside)

    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(None)


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Callable[[int], None]]:
    """A session in observe mode with fixed periods, and what trains so many steps more."""
    monkeypatch.setattr(plan, "MEASURED_AT", ())
    monkeypatch.setattr(plan, "PERIOD", PERIOD)
    ticks = itertools.count()
    monkeypatch.setattr(idle_steps, "time", lambda: 1e9 + 1e-3 * next(ticks))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = esper.attach(model, optimizer, run="cost", sampling=PERIOD, verbose=False)
    x, y = torch.randn(32, 6), torch.randint(2, (32,))

    def train(steps: int) -> None:
        for _ in range(steps):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss.item())

    return session, train


def test_a_step_takes_few_calls(
    observed: tuple[Any, Callable[[int], None]],
) -> None:
    """In the mean, with all frames, looks and audits; a step with nothing due takes seven."""
    _, train = observed
    train(1_000)
    steps = 10 * PERIOD
    with calls(OWN) as made:
        train(steps)

    assert made[0] <= 30 * steps


def test_a_look_asks_for_no_loss_by_itself(
    observed: tuple[Any, Callable[[int], None]],
) -> None:
    """A run keeps thousands of losses, and a call for each takes longer than all rules."""
    session, train = observed
    train(200)
    run, watch = session._parts.run, session._parts.diagnosis
    run.losses.extend((200 + step, 0.5) for step in range(1, LOSSES_KEPT + 1))
    run.step = run.losses[-1][0]
    watch._check(every_step_only=False)  # a rule reads each new loss once
    with calls() as made:
        watch._check(every_step_only=False)

    assert len(run.losses) == LOSSES_KEPT
    assert made[0] < LOSSES_KEPT


def test_a_look_does_not_ask_for_what_is_in_an_optimizer_for_each_reading(
    observed: tuple[Any, Callable[[int], None]],
) -> None:
    """torch's own optimizers wrap none; to search one for each kept reading was a third of it."""
    session, train = observed
    train(1_000)
    watch = session._parts.diagnosis
    with calls(optimizers.__file__) as made:
        watch._check(every_step_only=False)

    assert len(watch.recorder.gradients) > 10
    assert made[0] <= 6 * len(watch.recorder.gradients)


def test_a_reading_of_the_gradients_copies_no_settings_deeply(
    observed: tuple[Any, Callable[[int], None]],
) -> None:
    session, train = observed
    train(1)
    watch = session._parts.diagnosis
    with calls(dataclasses.__file__) as copied:
        watch.recorder._gradient.read(watch.optimizers[0])

    assert copied[0] == 0
