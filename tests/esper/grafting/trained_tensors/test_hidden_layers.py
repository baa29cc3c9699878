"""Layers in a plain list get gradients, and no optimizer trains them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.contracts import Severity

STEPS = 25


class Host(nn.Module):
    """One layer of its own, and what ``kept`` makes of two more."""

    def __init__(self, kept: Callable[[list[nn.Linear]], Any], *, learns: bool = True) -> None:
        super().__init__()
        self.own = nn.Linear(8, 8)
        layers = [nn.Linear(8, 8) for _ in range(2)]
        self.kept = kept(layers)
        object.__setattr__(self, "_layers", layers)
        self._learns = learns

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x)
        for layer in self._layers:
            with torch.set_grad_enabled(self._learns):
                out = layer(x)
            x = x + out
        return x


def train(model: nn.Module, *extra: nn.Parameter, after: Callable[[], None] = lambda: None) -> Any:
    optimizer = torch.optim.SGD([*model.parameters(), *extra], lr=0.01)
    session = esper.attach(model, optimizer, mode="automatic", server="", verbose=False)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 8)).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        after()
        session.step(loss)
    found = [f for f in session.findings() if "plain list" in f.observed]
    session.close()
    return found


KINDS: dict[str, tuple[Callable[[list[nn.Linear]], Any], str]] = {
    "list": (lambda layers: layers, "kept.0.weight"),
    "tuple": (tuple, "kept.0.weight"),
    "dict": (lambda layers: dict(enumerate(layers)), "kept.0.weight"),
    "lists in a list": (lambda layers: [[layer] for layer in layers], "kept.0.0.weight"),
    "parameters": (lambda layers: [p for layer in layers for p in layer.parameters()], "kept.0,"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_parameters_misses_are_named(kind: str) -> None:
    kept, name = KINDS[kind]
    (found,) = train(Host(kept))
    assert f"4 tensors, the first is {name}" in found.observed  # weight and bias of both
    assert found.severity is Severity.SERIOUS
    assert "nn.ModuleList" in found.remedy


def test_what_is_registered_frozen_or_gets_no_gradient_is_no_fault() -> None:
    assert train(Host(nn.ModuleList)) == []
    assert train(Host(lambda layers: layers, learns=False)) == []

    def frozen(layers: list[nn.Linear]) -> list[nn.Linear]:
        return [layer.requires_grad_(False) for layer in layers]

    assert train(Host(frozen)) == []
    both = Host(lambda layers: layers)
    both.again = nn.ModuleList(both.kept)
    assert train(both) == []


def test_what_an_optimizer_or_the_script_trains_is_no_fault() -> None:
    model = Host(lambda layers: layers)
    hidden = [p for layer in model.kept for p in layer.parameters()]
    assert train(model, *hidden) == []
    other = torch.optim.SGD(hidden, lr=0.01)
    assert train(model, after=other.step) == []

    def by_hand() -> None:
        with torch.no_grad():
            for parameter in hidden:
                parameter.sub_(0.01 * parameter.grad)

    assert train(model, after=by_hand) == []


class Rows(list[int]):
    """Reads its data when somebody goes through it."""

    def __iter__(self) -> Any:
        raise AssertionError("the data were read")


def test_data_and_vocabularies_of_a_module_are_not_gone_through() -> None:
    model = Host(nn.ModuleList)
    model.data = Rows([1])
    seen = []

    class Word:
        """Counts how many were looked at."""

        @property
        def __class__(self) -> Any:
            seen.append(1)
            return object

    model.many = [Word()] * 100_000
    assert train(model) == []
    assert len(seen) < 100_000


class Unmade(nn.Module):
    """Torch's ``__init__`` has not run."""

    def __init__(self) -> None:
        pass


class Proxy:
    """Is not bound to anything yet."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("not bound")


class Refusing(nn.Linear):
    """Does not tell its parameters."""

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("not yet")


def inference_weight() -> nn.Parameter:
    with torch.inference_mode():
        return nn.Parameter(torch.ones(2))


ODD: dict[str, Callable[[], Any]] = {
    "unmade module": Unmade,
    "proxy": Proxy,
    "module that refuses": lambda: Refusing(2, 2),
    "weight of inference mode": inference_weight,
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_object_in_a_list_raises_nothing(kind: str) -> None:
    model = Host(nn.ModuleList)
    model.odd = [ODD[kind]()]
    assert train(model) == []
