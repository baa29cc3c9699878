"""Steps in which nothing is due cost little, and what follows from their losses stays the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.diagnosis import plan
from esper.remedies import good_states
from esper.sdk import idle_steps

STEPS = 330


def trained(mode: str, *, loss_of: Callable[[int], float] | None = None) -> Any:
    """A session after some training with the periods of a slow machine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = esper.attach(model, optimizer, run="idle", mode=mode, sampling=40, verbose=False)
    x, y = torch.randn(32, 6), torch.randint(2, (32,))
    for step in range(1, STEPS + 1):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss if loss_of is None else loss_of(step))
    return session


@contextmanager
def clock(step: float) -> Iterator[None]:
    """Inside, the clock of idle steps goes on by ``step`` seconds at each look."""
    with pytest.MonkeyPatch.context() as patch:
        ticks = itertools.count()
        patch.setattr(idle_steps, "time", lambda: 1e9 + step * next(ticks))
        yield


def seen(session: Any) -> dict[str, Any]:
    """What a session knows that follows from the losses and the number of steps."""
    state = session.state_dict()
    states = session._parts.surgery.states
    return {
        "step": state["step"],
        "losses": list(session._parts.run.losses),
        "guard": state["guard"],
        "recent": session._parts.diagnosis._recent,
        "frame": session.frame().step,
        "good states": states and (states.steps, states._next),
        "movement": session._parts.ledger._movement._steps,
        "findings": (session.findings(), session.findings(resolved=True)),
        "passes": [seen.step for seen in session._parts.diagnosis.recorder.passes],
        "readings": [seen.step for seen in session._parts.diagnosis.recorder.gradients],
    }


def wavy(step: int) -> float:
    return 1.0 + 0.3 * math.sin(step) + (1.5 if step % 37 == 0 else 0.0)


def broken(step: int) -> float:
    return math.inf if step in (211, 250) else 2.0 if step != 290 else 40.0


@pytest.mark.parametrize("mode", ["observe", "automatic"])
@pytest.mark.parametrize("loss_of", [None, wavy, broken], ids=["falls", "is noisy", "breaks"])
def test_a_run_with_idle_steps_knows_the_same(
    mode: str, loss_of: Callable[[int], float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_steps: list[int] = []
    surgery_on_step = esper.sdk.surgery.Surgery.on_step

    def counted(surgery: Any) -> None:
        whole_steps[-1] += 1
        surgery_on_step(surgery)

    monkeypatch.setattr(esper.sdk.surgery.Surgery, "on_step", counted)
    monkeypatch.setattr(plan, "MEASURED_AT", ())  # no plan that follows the machine's speed
    monkeypatch.setattr(good_states, "SHARE", math.inf)
    found = []
    for tick in (0.0, 1.0):  # all within a quarter of a second, and none
        whole_steps.append(0)
        with clock(tick):
            found.append(seen(trained(mode, loss_of=loss_of)))

    assert found[0] == found[1]
    assert whole_steps[1] == STEPS
    assert whole_steps[0] < STEPS / 2


def test_a_jump_of_the_loss_is_looked_at_in_its_step() -> None:
    with clock(0.0):
        session = trained("observe", loss_of=broken)

    assert 211 in {finding.since_step for finding in session.findings(resolved=True)}


def test_an_idle_step_calls_none_of_the_parts_in_the_optimizer() -> None:
    with clock(0.0):
        session = trained("observe")
        parts = session._parts.diagnosis.recorder._parts + session._parts.ledger._movement._parts
        parts += session._parts.surgery.sampler._steps._parts

        modes = session._parts.diagnosis.recorder._modes.counts  # batch normalisation is looked at
        assert [part.armed for part in parts] == [modes, False, False]


def test_reports_and_calls_of_the_script_see_idle_steps() -> None:
    with clock(0.0):
        session = trained("observe")
        session.step(0.05)
        session.report(accuracy=0.9)
        session.step(0.04)

        assert session._steps.reported == {}
        assert session.state_dict()["guard"]["good"][-2:] == [0.05, 0.04]
