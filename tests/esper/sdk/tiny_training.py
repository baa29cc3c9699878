"""The smallest training that is one: dropout, AdamW, a schedule, batches drawn at random."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper import Session
from esper.diagnosis import Change
from esper.grafting import Slot, slot_of
from tests.esper.conftest import LACKS_CAPACITY


def slot_at(model: nn.Module, layer: str) -> Slot:
    slot = slot_of(model.get_submodule(layer))
    assert slot is not None
    return slot


def grafts_at(model: nn.Module, layer: str) -> list[str]:
    """Slugs of the layer's grafts; a session that has ended leaves no empty slot."""
    slot = slot_of(model.get_submodule(layer))
    return [] if slot is None else list(slot.grafts())


def say_capacity(session: Session) -> None:
    """As the diagnosis says that the run lacks capacity."""
    session._parts.findings.report(Change.OPENED, LACKS_CAPACITY)


def weight_of(model: nn.Module, layer: str) -> Tensor:
    return model.get_parameter(f"{layer}.weight").detach()


class Training:
    """Equal seeds give equal losses, to the bit."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU(),
            nn.Linear(16, 4),
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1.0 / (1.0 + 0.01 * step)
        )
        self.rule = torch.randn(8, 4)
        self.spoil: Callable[[Tensor], Tensor] = lambda loss: loss

    def batch_loss(self) -> Tensor:
        x = torch.randn(32, 8)
        return F.cross_entropy(self.model(x), (x @ self.rule).argmax(1))

    def step(self, session: Session | None = None) -> float:
        """One optimizer step; the loss."""
        loss = self.spoil(self.batch_loss())
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        if session is not None:
            session.step(loss)
        return loss.item()

    def run(self, steps: int, session: Session | None = None) -> list[float]:
        return [self.step(session) for _ in range(steps)]

    def until(
        self, condition: Callable[[], object], session: Session, seconds: float = 300.0
    ) -> list[float]:
        """Trains on until ``condition`` holds."""
        losses = []
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "trained on in vain"
            losses.append(self.step(session))
            time.sleep(0.002)
        return losses

    def evaluate(self) -> float:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(64, 8, generator=generator)
        return F.cross_entropy(self.model(x), (x @ self.rule).argmax(1)).item()
