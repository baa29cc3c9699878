"""The guard tells a blow-up from noise."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper.contracts import ViolationRule
from esper.grafting import LossGuard, non_finite_gradients


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_counts_at_once(loss: float) -> None:
    verdict = LossGuard().observe(loss)
    assert verdict is not None
    assert verdict.rule is ViolationRule.NON_FINITE


def test_a_blow_up_counts_at_the_third_step() -> None:
    guard = LossGuard()
    assert not any(guard.observe(1.0 + 0.01 * (step % 3)) for step in range(30))
    assert guard.observe(9.0) is None
    assert guard.observe(10.0) is None
    verdict = guard.observe(11.0)
    assert verdict is not None
    assert verdict.rule is ViolationRule.LOSS_BLOW_UP
    assert verdict.observed == 11.0
    assert 3.0 < verdict.limit < 3.1, "the high losses did not raise their own limit"


def test_a_single_spike_is_noise() -> None:
    guard = LossGuard()
    losses = [1.0] * 20 + [50.0, 1.0, 50.0, 50.0, 1.0] * 4
    assert not any(guard.observe(loss) for loss in losses)


def test_a_clean_run_raises_no_alarm() -> None:
    noise = random.Random(0)
    for run in range(5):
        guard = LossGuard()
        for step in range(600):
            loss = 3.0 * math.exp(-step / 500) + 0.3 + noise.gauss(0, 0.1 + 0.02 * run)
            assert guard.observe(loss) is None


def test_a_negative_loss_has_a_limit_too() -> None:
    guard = LossGuard()
    for _ in range(20):
        guard.observe(-2.0)
    assert [guard.observe(-1.9) for _ in range(5)] == [None] * 5
    assert [guard.observe(3.0) is None for _ in range(3)] == [True, True, False]


def test_the_first_losses_of_a_run_are_not_judged() -> None:
    guard = LossGuard()
    assert not any(guard.observe(loss) for loss in [0.1, 5.0, 5.0, 5.0])


def test_a_reset_guard_has_forgotten() -> None:
    guard = LossGuard()
    for _ in range(20):
        guard.observe(1.0)
    guard.reset()
    assert not any(guard.observe(100.0) for _ in range(5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradients_are_named(bad: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    assert non_finite_gradients(model) == ()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[2].weight.grad = None
    assert non_finite_gradients(model) == ()
    model[1].bias.grad[1] = bad
    assert non_finite_gradients(model) == ("1.bias",)


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 60_000.0), (torch.float32, 1e30)])
def test_large_gradients_are_finite(dtype: torch.dtype, large: float) -> None:
    layer = nn.Linear(64, 64, dtype=dtype)
    layer.weight.grad = torch.full_like(layer.weight, large)
    assert non_finite_gradients(layer) == ()
    layer.bias.grad = torch.full_like(layer.bias, math.nan)
    assert non_finite_gradients(layer) == ("bias",)


def test_usual_gradients_cost_only_the_cheap_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest absolute value takes 15 times as long on a CPU, in each step of a probation."""
    norm, orders = torch._foreach_norm, []

    def watched(tensors: list[torch.Tensor], order: float = 2.0) -> tuple[torch.Tensor, ...]:
        orders.append(order)
        return norm(tensors, order)

    monkeypatch.setattr(torch, "_foreach_norm", watched)
    layer = nn.Linear(8, 8)
    layer.weight.grad = torch.ones_like(layer.weight)
    assert non_finite_gradients(layer) == ()
    assert orders == [2.0]
    layer.weight.grad[3, 3] = math.inf
    assert non_finite_gradients(layer) == ("weight",)
    assert orders == [2.0, 2.0, math.inf]


@given(st.lists(st.floats(-5.0, 5.0, width=32), min_size=25, max_size=80), st.floats(1.0, 60.0))
def test_the_short_way_gives_the_same_verdicts(losses: list[float], jump: float) -> None:
    quick, slow = LossGuard(), LossGuard()
    slow._is_usual = lambda loss: False  # type: ignore[method-assign]
    for loss in [*losses, jump, jump, jump, *losses]:
        assert quick.observe(loss) == slow.observe(loss)
    assert quick.state_dict() == slow.state_dict()
