"""D1: models and optimizers whose classes define ``==``, or a length of 0, as they like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper


class RefusesToCompare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("models are not compared")

    __hash__ = nn.Module.__hash__

    def __len__(self) -> int:
        return 0


class ComparesTensors(RefusesToCompare):
    def __eq__(self, other: object) -> Any:
        return self.body.weight == getattr(other, "body", self.body).weight

    __hash__ = nn.Module.__hash__


@dataclass(unsafe_hash=True)
class ComparesSettings(nn.Module):
    width: int = 8

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        self.body = nn.Linear(8, self.width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


class Meter(nn.Module):
    """As a metric of torchmetrics: its hash is another one with each value."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __hash__(self) -> int:
        return hash(self.seen)


class HasMeter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.meter = nn.Linear(8, 8), Meter()

    def forward(self, x: Tensor) -> Tensor:
        self.meter.seen += 1
        found: Tensor = self.body(x)
        return found


class Optimizer(torch.optim.SGD):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("optimizers are not compared")

    __hash__ = object.__hash__

    def __len__(self) -> int:
        return 0


def attached(kind: type[nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer, esper.Session]:
    model = kind()
    optimizer = Optimizer(model.parameters(), lr=0.05)
    return model, optimizer, esper.attach(model, optimizer, mode="supervised", verbose=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, session: esper.Session) -> None:
    for _ in range(12):
        loss = model(torch.randn(16, 8)).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)


KINDS: tuple[type[nn.Module], ...] = (RefusesToCompare, ComparesTensors, ComparesSettings, HasMeter)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_watched_treated_and_grafted(kind: type[nn.Module]) -> None:
    one = attached(kind)
    session = one[2]
    train(*one)
    receipt = session.graft("body", "proj_lora_64", rank=2)
    train(*one)
    session.undo(receipt)
    session.undo(session.remedy("set_lr", factor=0.5))
    session.undo(session.remedy("rewind"))
    train(*one)
    assert not any("failed" in finding.observed for finding in session.findings())
    session.close()


def test_equal_models_are_two_models() -> None:
    one, other = attached(ComparesSettings), attached(ComparesSettings)
    for run in (one, other):
        train(*run)
    receipt = one[2].graft("body", "proj_lora_64", rank=2)
    for run in (one, other):
        train(*run)
        assert run[2].frame() is not None
    assert other[2].layers[0].graftable
    one[2].undo(receipt)
    other[2].undo(other[2].graft("body", "proj_lora_64", rank=2))
    for run in (one, other):
        run[2].close()
