"""A graft is tried in shadow: on a copy, against a twin, and the run is as if nothing had been."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.exceptions import ConfigurationError
from esper.sdk.session import Session


def data(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=draws)
    return x, torch.sin(2 * x[:, :1]) * x[:, 1:2]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def held_out(model: nn.Module) -> float:
    return float(loss_of(model, data(256, 99)))


BATCHES = [data(64, seed) for seed in range(40)]


def trained(steps: int, shadow_at: int = -1) -> tuple[nn.Module, Session, list[float], Any]:
    """A run with dropout, so that the random streams matter."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    session = esper.attach(
        model, optimizer, mode="supervised", verbose=False, server="", sampling=10
    )
    losses, twin = [], None
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, BATCHES[step % len(BATCHES)])
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)
        losses.append(loss.item())
        if step == shadow_at:
            twin = session.twin(
                "3", "mlp_gelu_2048", hidden=32, batches=BATCHES, loss=loss_of,
                evaluate=held_out, steps=240, seconds=600.0,
            )  # fmt: skip
    return model, session, losses, twin


def test_the_run_goes_on_to_the_bit_as_without_it() -> None:
    alone, _, losses, _ = trained(80)
    shadowed, session, same, twin = trained(80, shadow_at=60)

    assert twin is not None
    assert same == losses
    for one, other in zip(alone.parameters(), shadowed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert session.adaptations == ()
    assert [name for name, _ in shadowed.named_parameters()] == [
        name for name, _ in alone.named_parameters()
    ]


def test_its_gain_is_that_of_the_same_training_with_the_graft() -> None:
    _, session, _, twin = trained(61, shadow_at=60)

    assert twin.steps == 240
    assert twin.looks >= 10
    assert twin.low < twin.gain < twin.high
    assert twin.gain > 0.005  # the host is a bottleneck
    closed = session._parts.local.memory.experience.get("mlp_gelu_2048")  # type: ignore[union-attr]
    assert (closed is not None) == (twin.helps(0.005) is not None)


def test_a_budget_that_is_used_up_ends_it_and_nothing_is_claimed() -> None:
    _, session, _, _ = trained(20)
    model = copy.deepcopy(session._parts.setup.model.state_dict())
    found = session.twin(
        "3", "mlp_gelu_2048", batches=BATCHES, loss=loss_of, evaluate=held_out,
        steps=10**6, seconds=1e-9,
    )  # fmt: skip
    assert (found.steps, found.looks) == (0, 0)
    assert found.helps(0.005) is None
    for name, value in session._parts.setup.model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, model[name]), name


def test_what_it_cannot_do_is_said_before_anything_is_copied() -> None:
    _, session, _, _ = trained(20)

    with pytest.raises(ConfigurationError, match="at least one recorded batch"):
        session.twin("3", "mlp_gelu_2048", batches=[], loss=loss_of, evaluate=held_out)
    with pytest.raises(ConfigurationError, match="must be above 0"):
        session.twin(
            "3", "mlp_gelu_2048", batches=BATCHES, loss=loss_of, evaluate=held_out, steps=0
        )
