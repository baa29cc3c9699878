"""A small model on several ranks, each with data of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import esper
from esper.contracts import SafetyPolicy
from esper.grafting import Receipt
from esper.grafting.tensors.digests import digest
from esper.sdk import Session

ROWS = 6  # of each rank
# No verdict of the local loop ends a graft in the middle of a test.
LONG_PROBATION = SafetyPolicy(maturity_steps=9_000, probation_steps=10_000)


class TinyNet(nn.Module):
    """Two hidden layers, a norm with buffers, dropout: what a rollback has to bring back."""

    def __init__(self, *, dropout: float = 0.0, norm: bool | None = True) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 12)
        kinds = {True: nn.BatchNorm1d, False: nn.LayerNorm, None: nn.Identity}
        self.norm = kinds[norm](12)
        self.drop = nn.Dropout(dropout)
        self.outer = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.inner(x)))
        return self.outer(self.drop(x))


@dataclass
class Replica:
    """One rank's side of the training."""

    rank: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    session: Session
    average: AveragedModel | None = None
    at: int = 0

    @property
    def bare(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def batch(self) -> tuple[Tensor, Tensor]:
        return batch(self.rank, self.at)

    def step(self, loss_factor: float = 1.0) -> float:
        x, y = self.batch()
        self.at += 1
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.bare)
        self.session.step(loss.detach() * loss_factor)
        return loss.item()

    def run(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]

    def parameters(self) -> str:
        """Hex SHA-256 of what must be equal on all ranks."""
        total = hashlib.sha256()
        for model in (self.bare, self.average):
            for name, parameter in model.named_parameters() if model is not None else ():
                total.update(name.encode() + parameter.detach().numpy().tobytes())
        return total.hexdigest()

    def state(self) -> list[Any]:
        """All that a rollback must restore on this rank."""
        optimizer = self.optimizer.state_dict()
        moments = [
            (key, name, value.clone() if isinstance(value, Tensor) else value)
            for key, held in optimizer["state"].items()
            for name, value in held.items()
        ]
        return [
            digest(self.bare),
            digest(self.average) if self.average is not None else "",
            len(optimizer["param_groups"]),
            repr(self.scheduler.state_dict()),
            repr([(k, n, v.tolist() if isinstance(v, Tensor) else v) for k, n, v in moments]),
            torch.get_rng_state().tolist(),
        ]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def batch(rank: int, at: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * at + rank)
    x = torch.randn(rows, 7, generator=generator)
    return x, (x[:, :3] + 0.3 * torch.randn(rows, 3, generator=generator)).argmax(1)


@contextmanager
def replica(
    rank: int,
    *,
    dropout: float = 0.0,
    norm: bool | None = True,
    averaged: bool = False,
    ddp: dict[str, Any] | None = None,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    **attach: Any,
) -> Iterator[Replica]:
    """Attached and seen to run once; closed at the end."""
    torch.manual_seed(3)
    model = DistributedDataParallel(TinyNet(dropout=dropout, norm=norm), **(ddp or {}))
    torch.manual_seed(100 + rank)
    optimizer = (make_optimizer or adamw)(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    average = AveragedModel(model.module) if averaged else None
    attach.setdefault("safety_policy", LONG_PROBATION)
    session = esper.attach(model, optimizer, scheduler=scheduler, copies=average, **attach)
    with session:
        yield Replica(rank, model, optimizer, scheduler, session, average)


def graft(
    side: Replica, layer: str = "inner", slug: str = "proj_lora_64", since: str = ""
) -> Receipt:
    return side.session.graft(layer, slug, since=since)
