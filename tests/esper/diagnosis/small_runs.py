"""Small real trainings, each with or without one fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from sklearn import datasets
from sklearn.datasets import make_circles
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.contracts import Finding, Severity

Loss = Callable[[Tensor, Tensor], Tensor]


_load_digits = cache(datasets.load_digits)  # sklearn parses its file at each call


def digits(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    data = _load_digits()
    x = scale * torch.tensor(data.data, dtype=torch.float32) / 16.0
    return x, torch.tensor(data.target)


def circles(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    x, y = make_circles(1000, noise=0.1, random_state=0)
    return torch.tensor(x * scale, dtype=torch.float32), torch.tensor(y)


def deep(
    depth: int, activation: type[nn.Module] = nn.Tanh, width: int = 5, inputs: int = 2, out: int = 2
) -> nn.Sequential:
    """``depth`` hidden layers, each with Xavier weights."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(inputs if i == 0 else width, width), activation()]
    layers.append(nn.Linear(width, out))
    model = nn.Sequential(*layers)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
    return model


def perceptron(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


@dataclass
class Run:
    """One training loop; a fault changes one of its parts."""

    model: nn.Module = field(default_factory=perceptron)
    data: tuple[Tensor, Tensor] = field(default_factory=digits)
    loss: Loss = F.cross_entropy
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam
    schedule: Callable[[int], float] | None = None
    batch: int = 32
    steps: int = 60
    zero_grad_every: int = 1
    before: Callable[[Run, int], None] = lambda run, step: None
    evaluate: Callable[[nn.Module], float] | None = None
    passes_number: bool = False
    mode: str = "observe"
    sampling: Any = None  # steps between health frames, where chance decides otherwise

    def start(self) -> esper.Session:
        self.opt = self.optimizer(self.model)
        evaluate = None if self.evaluate is None else lambda: self.evaluate(self.model)  # type: ignore[misc]
        return esper.attach(
            self.model, self.opt, mode=self.mode, evaluate=evaluate, sampling=self.sampling
        )

    def go(self) -> Result:
        with self.start() as session:
            return self.train(session)

    def train(self, session: esper.Session) -> Result:
        generator = torch.Generator().manual_seed(0)
        base = [group["lr"] for group in self.opt.param_groups]
        found: dict[str, int] = {}
        losses = []
        for step in range(1, self.steps + 1):
            self.before(self, step)
            x, y = self.data
            if self.schedule is not None:
                for group, lr in zip(self.opt.param_groups, base, strict=True):
                    group["lr"] = lr * self.schedule(step)
            rows = torch.randint(0, len(x), (self.batch,), generator=generator)
            if (step - 1) % self.zero_grad_every == 0:
                self.opt.zero_grad()
            loss = self.loss(self.model(x[rows]), y[rows])
            torch.autograd.backward(loss)
            self.opt.step()
            losses.append(loss.item())
            session.step(loss.item() if self.passes_number else loss)
            # The audit of the ledger at each step took as long as the training.
            looks = step <= 20 or step % 10 == 0
            for finding in session.findings() if looks else session._parts.findings.all():
                found.setdefault(finding.slug or finding.rule, step)
        diagnosis = session._parts.diagnosis
        assert diagnosis is None or diagnosis.diagnosis.failed == {}
        return Result(
            session.findings(), session.findings(resolved=True), found, losses, session.adaptations
        )


@dataclass
class Result:
    """What a run's session said.

    Attributes:
        open, resolved: at the end.
        steps: slug -> the step after which it was first among the findings.
        losses: of all steps.
        grafted: what was ever grafted.
    """

    open: list[Finding]
    resolved: list[Finding]
    steps: dict[str, int]
    losses: list[float]
    grafted: tuple[esper.sdk.adaptation.Adaptation, ...] = ()

    def alarms(self) -> list[str]:
        """Everything above ``info`` that was ever found."""
        every = [*self.open, *self.resolved]
        return [f"{f.slug}: {f.observed}" for f in every if f.severity is not Severity.INFO]

    def first(self, slug: str) -> Finding:
        return next(f for f in [*self.open, *self.resolved] if f.slug == slug)


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """All matrices times a factor."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model


class Detached(nn.Module):
    """The script forgot that ``detach`` cuts the graph."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.features, self.middle, self.head = (
            nn.Linear(64, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 10),
        )
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.middle(torch.relu(self.features(x))))
        out: Tensor = self.head(h.detach() if self.cut else h)
        return out


def cosine(warmup: int, total: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    return factor
