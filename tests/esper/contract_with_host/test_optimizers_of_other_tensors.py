"""What trains the model is not always what Esper was given: no finding claims that it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.exceptions import IncompatibleLayerError
from esper.grafting.trained_tensors import orphans

Step = Callable[[Tensor], Tensor]
STEPS = 45  # a tensor is compared after 20 and 40 steps


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def loss_of(model: Any, x: Tensor) -> Tensor:
    found: Tensor = (model(x).float() - x[:, :4]).pow(2).mean()
    return found


def flat_buffer(model: nn.Module) -> tuple[Any, Step]:
    """Each parameter is a view of the one tensor that the optimizer holds."""
    own = list(model.parameters())
    flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in own]))
    flat.grad = torch.zeros_like(flat)
    parts = [p.numel() for p in own]
    for p, value, grad in zip(own, flat.data.split(parts), flat.grad.split(parts), strict=True):
        p.data, p.grad = value.view_as(p), grad.view_as(p)
    optimizer = torch.optim.Adam([flat], lr=1e-3)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, x)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss

    return optimizer, step


def master_weights(model: nn.Module) -> tuple[Any, Step]:
    """The optimizer holds copies in float32, which are written back by ``.data``."""
    model.bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.Adam(masters, lr=1e-3)

    def step(x: Tensor) -> Tensor:
        model.zero_grad()
        loss = loss_of(model, x.bfloat16())
        torch.autograd.backward(loss)
        for p, master in zip(model.parameters(), masters, strict=False):
            master.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        for p, master in zip(model.parameters(), masters, strict=False):
            p.data.copy_(master.data)
        return loss

    return optimizer, step


def functional(model: nn.Module) -> tuple[Any, Step]:
    """The loss is computed from other tensors than the model's."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(weights.values(), lr=1e-3)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(lambda x: torch.func.functional_call(model, weights, (x,)), x)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss

    return optimizer, step


def one_of_two(model: nn.Module) -> tuple[Any, Step]:
    """Each optimizer has a half of the model, and attach gets the first."""
    own = list(model.parameters())
    first, second = torch.optim.Adam(own[:2], lr=1e-3), torch.optim.SGD(own[2:], lr=1e-2)

    def step(x: Tensor) -> Tensor:
        first.zero_grad()
        second.zero_grad()
        loss = loss_of(model, x)
        torch.autograd.backward(loss)
        first.step()
        second.step()
        return loss

    return first, step


def by_hand(model: nn.Module) -> tuple[Any, Step]:
    """The script itself updates what its optimizer does not hold."""
    first, *others = model.parameters()
    optimizer = torch.optim.SGD([first], lr=1e-2)

    def step(x: Tensor) -> Tensor:
        model.zero_grad()
        loss = loss_of(model, x)
        torch.autograd.backward(loss)
        optimizer.step()
        with torch.no_grad():
            for p in others:
                p.sub_(1e-2 * p.grad)  # type: ignore[operator]
        return loss

    return optimizer, step


def replaced_in_vain(model: nn.Module) -> tuple[Any, Step]:
    """A fault: the optimizer was made before the layer that takes the place of an old one."""
    old = nn.Linear(16, 4)
    optimizer = torch.optim.SGD([*model[0].parameters(), *old.parameters()], lr=1e-2)  # type: ignore[index]

    def step(x: Tensor) -> Tensor:
        model.zero_grad()
        loss = loss_of(model, x)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss

    return optimizer, step


KINDS: dict[Callable[[nn.Module], tuple[Any, Step]], list[str]] = {
    flat_buffer: [],
    master_weights: ["4 tensors, the first is 0.weight, change, but are in no optimizer that"],
    functional: ["4 tensors held by an optimizer are not in the model"],
    one_of_two: ["2 tensors, the first is 2.weight, are in SGD, an optimizer that Esper was not"],
    by_hand: ["3 tensors, the first is 0.bias, change, but are in no optimizer that Esper was"],
    replaced_in_vain: [
        "weight: trainable, but in no optimizer: it will never change",
        "bias: trainable, but in no optimizer: it will never change",
        "2 tensors held by an optimizer are not in the model",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_does_not_train_is_said_not_to_train(
    kind: Callable[[nn.Module], tuple[Any, Step]],
) -> None:
    model = make_model()
    optimizer, step = kind(model)
    mode = "automatic" if kind is not replaced_in_vain else "observe"  # else it is adopted
    session = esper.attach(model, optimizer, run="kinds", mode=mode, verbose=False)  # type: ignore[arg-type]
    at_attach = session.findings()
    for _ in range(STEPS):
        session.step(step(torch.randn(16, 8)))

    ledger = [f.observed for f in session.findings() if f.rule == "optimizer_ledger"]
    assert len(ledger) == len(KINDS[kind])
    assert all(map(str.startswith, sorted(ledger), sorted(KINDS[kind])))
    if kind is not by_hand:  # what a script will do by itself cannot be seen before
        assert kind is replaced_in_vain or not any("never" in str(f) for f in at_attach)
    assert session.remedies == ()


def test_an_optimizer_that_is_made_after_attach_is_noticed_at_the_first_step() -> None:
    model = make_model()
    session = esper.attach(
        model, torch.optim.SGD(model[0].parameters(), lr=1e-2), run="later", verbose=False
    )
    assert any("in no optimizer" in str(finding) for finding in session.findings())
    later = torch.optim.Adam(model[2].parameters())
    loss = loss_of(model, torch.randn(16, 8))
    torch.autograd.backward(loss)
    later.step()
    session.step(loss)

    (finding,) = session.findings()
    assert "are in Adam, an optimizer that Esper was not given" in str(finding)


def test_an_optimizer_of_an_earlier_run_hides_nothing() -> None:
    """In a notebook it is garbage that nobody has collected yet."""
    model = make_model()
    earlier: Any = torch.optim.SGD(model.parameters(), lr=1e-2)
    earlier.itself = earlier
    del earlier
    session = esper.attach(
        model, torch.optim.SGD(model[0].parameters(), lr=1e-2), run="again", verbose=False
    )

    assert {f.layer for f in session.findings() if "in no optimizer" in str(f)} == {"2"}


@pytest.mark.parametrize("held", ["too small for a copy", "without a gradient"])
def test_what_cannot_train_the_model_is_told_in_the_first_step(held: str) -> None:
    model = make_model()
    small = held == "too small for a copy"
    others = [nn.Parameter(torch.zeros(1))] if small else list(make_model().parameters())
    if small:
        others[0].grad = torch.zeros(1)
    optimizer = torch.optim.Adam(others)
    session = esper.attach(model, optimizer, run="empty", mode="observe", verbose=False)
    assert not any("never" in str(finding) for finding in session.findings())
    loss = loss_of(model, torch.randn(16, 8))
    torch.autograd.backward(loss)
    optimizer.step()
    session.step(loss)

    untrained = {f.layer for f in session.findings() if "in no optimizer" in str(f)}
    assert untrained == {"0", "2"}


def accumulate(model: nn.Module) -> Tensor:
    loss = loss_of(model, torch.randn(16, 8))
    torch.autograd.backward(loss)
    return loss


def replaced(session: esper.Session) -> list[str]:
    return [f.observed for f in session.findings() if "which Esper was not given" in f.observed]


def test_a_script_that_goes_on_with_another_optimizer_is_told_to_attach_it() -> None:
    """A graft would be trained by the steps of the old one, which makes none."""
    model = make_model()
    old, new = torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=1e-2)
    session = esper.attach(model, old, run="replaced", mode="supervised", verbose=False)

    def train(optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = accumulate(model)
            optimizer.step()
            session.step(loss)

    train(old, 3)
    for _ in range(40):  # the other one exists, and trains nothing
        session.step(accumulate(model))
    assert replaced(session) == []

    train(old, 1)
    train(new, 20)
    (found,) = replaced(session)
    assert found.startswith("Adam made no step since step 44 of the session, and SGD, which")
    with pytest.raises(IncompatibleLayerError, match="SGD, which Esper was not given"):
        session.graft("2", "proj_lora_64")

    train(old, 1)
    assert replaced(session) == []
    assert session.graft("2", "proj_lora_64").present


def test_a_script_that_updates_by_hand_is_not_searched_for_an_optimizer_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search looks at every object of the process, which takes longer than many steps."""
    searches = []
    living = orphans._living_optimizers
    monkeypatch.setattr(orphans, "_living_optimizers", lambda: searches.append(1) or living())
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    session = esper.attach(model, optimizer, run="by hand", verbose=False)
    for _ in range(400):
        loss = accumulate(model)
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 1e-2 * parameter.grad
        model.zero_grad()
        session.step(loss)
    assert len(searches) <= 8
    assert replaced(session) == []
