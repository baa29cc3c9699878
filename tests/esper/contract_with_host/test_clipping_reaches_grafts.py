"""A graft's gradients are clipped as the user clips those of the optimizer, which lacks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.grafting import audit

LIMIT, BOUND = 0.05, 0.004


@dataclass
class Loop:
    """A model with a graft, whose optimizer does not hold the graft's weights."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    before: list[nn.Parameter]  # a list that was made before the graft
    scaler: Any = None
    raw: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    @property
    def held(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def grafted(self) -> list[nn.Parameter]:
        named = self.model.named_parameters()
        return [p for name, p in named if ".esper." in name and p.grad is not None]

    def backward(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(16, 8)).pow(2).mean()
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
        self.raw = {p: p.grad.clone() for p in (*self.held, *self.grafted) if p.grad is not None}
        return loss

    def ratio(self, scale: float = 1.0) -> float:
        """What clip_grad_norm_ over the optimizer's own tensors multiplies by."""
        norms = torch.stack([self.raw[p].norm() / scale for p in self.held if p in self.raw])
        return LIMIT / (float(norms.norm()) + 1e-6)


def loop_with_graft(*, scaler: Any = None, dtype: torch.dtype = torch.float32) -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = list(model.parameters())
    esper.graft(model, "2", "proj_lora_64", optimizer=optimizer, sample=torch.randn(4, 8))
    loop = Loop(model, optimizer, before, scaler)
    for _ in range(2):
        loop.backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return loop


def whole_model(loop: Loop) -> None:
    loop.backward()
    nn.utils.clip_grad_norm_(loop.model.parameters(), LIMIT)
    loop.raw = {p: p.grad.clone() for p in loop.grafted if p.grad is not None}
    loop.optimizer.step()


def over_groups(loop: Loop) -> None:
    loop.backward()
    nn.utils.clip_grad_norm_(loop.held, LIMIT)
    loop.optimizer.step()


def older_list(loop: Loop) -> None:
    loop.backward()
    nn.utils.clip_grad_norm_(loop.before, LIMIT, foreach=False)
    loop.optimizer.step()


def by_hand(loop: Loop) -> None:
    loop.backward()
    for parameter in loop.held:
        parameter.grad = None if parameter.grad is None else parameter.grad * loop.ratio()
    loop.optimizer.step()


def in_a_closure(loop: Loop) -> None:
    def closure() -> Tensor:
        loss = loop.backward()
        nn.utils.clip_grad_norm_(loop.held, LIMIT)
        return loss

    loop.optimizer.step(closure)  # type: ignore[arg-type]


def unscaled_and_clipped(loop: Loop) -> None:
    loop.backward()
    loop.scaler.unscale_(loop.optimizer)
    nn.utils.clip_grad_norm_(loop.held, LIMIT)
    loop.scaler.step(loop.optimizer)


@pytest.mark.parametrize(
    "step", [over_groups, older_list, by_hand, in_a_closure, whole_model, unscaled_and_clipped]
)
def test_a_norm_is_clipped_by_the_same_ratio(step: Callable[[Loop], None]) -> None:
    scaled = step is unscaled_and_clipped
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    loop = loop_with_graft(scaler=scaler)

    step(loop)

    # A graft's gradients are unscaled as they arrive.
    ratio = 1.0 if step is whole_model else loop.ratio(1024.0 if scaled else 1.0)
    assert ratio == 1.0 or ratio < 0.5
    assert loop.grafted
    for parameter in loop.grafted:
        torch.testing.assert_close(parameter.grad, loop.raw[parameter] * ratio)
    assert not any("is not repeated" in found.observed for found in audited(loop))


def test_values_are_cut_off_at_the_same_bound() -> None:
    loop = loop_with_graft()
    loop.backward()
    nn.utils.clip_grad_value_(loop.held, BOUND)
    loop.optimizer.step()

    for parameter in loop.grafted:
        assert torch.equal(parameter.grad, loop.raw[parameter].clamp(-BOUND, BOUND))
    assert max(float(loop.raw[p].abs().max()) for p in loop.grafted) > BOUND


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
def test_without_clipping_nothing_changes(scaled: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    loop = loop_with_graft(scaler=scaler)
    loop.backward()
    if scaler is None:
        nn.utils.clip_grad_norm_(loop.held, 1e6)  # which is far away
        loop.optimizer.step()
    else:
        scaler.step(loop.optimizer)

    assert all(torch.equal(p.grad, loop.raw[p]) for p in loop.grafted if p.grad is not None)


def test_what_cannot_be_repeated_is_told() -> None:
    loop = loop_with_graft()
    loop.backward()
    for parameter in loop.held:
        assert parameter.grad is not None
        parameter.grad.sign_()
    loop.optimizer.step()

    assert all(torch.equal(p.grad, loop.raw[p]) for p in loop.grafted if p.grad is not None)
    assert any("is not repeated" in found.observed for found in audited(loop))


def audited(loop: Loop) -> Any:
    return audit(loop.model, [loop.optimizer])
