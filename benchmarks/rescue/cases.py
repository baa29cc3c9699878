"""What a case is: a training with one fault, and its twin without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows, or of tokens, of which the largest output is the target's; else NaN."""
    out = model(x)
    if out.shape[:-1] != y.shape or out.shape[-1] < 2 or y.is_floating_point():
        return math.nan
    return float((out.argmax(-1) == y).float().mean())


@dataclass
class Trial:
    """One training.

    Attributes:
        x, y: the training data; held_x, held_y: those that are held out.
        before: called before each step.
        metric: of the model on held-out data, larger is better.
        evaluates: the script gives Esper its held-out loss.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    optimizer: torch.optim.Optimizer
    loss: Loss = F.cross_entropy
    batch: int = 32
    zero_every: int = 1
    before: Callable[[Trial, int], None] = lambda trial, step: None
    metric: Callable[[nn.Module, Tensor, Tensor], float] = accuracy
    evaluates: bool = False

    def score(self) -> float:
        """The metric, in evaluation mode; the modes of the modules stay as they were."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                return self.metric(self.model, self.held_x, self.held_y)
        finally:
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def held_out_loss(self) -> float:
        return float(self.loss(self.model(self.held_x), self.held_y))


@dataclass(frozen=True)
class Case:
    """A fault and its twin.

    Attributes:
        rules: slugs of the rules that name the fault rightly.
        labels: of the truth, where a tier has labels instead.
        bug: the script is at fault, so it can be told and not repaired.
        by_definition: it is a fault also where it does not hurt.
        learned: score of a twin that is healthy.
        cures: the same training after each restart with one more of AutoTrainer's cures.
        begins: the first step in which the fault acts.
    """

    tier: str
    kind: str
    name: str
    seed: int
    steps: int
    faulty: Callable[[], Trial]
    healthy: Callable[[], Trial]
    rules: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()
    bug: bool = False
    by_definition: bool = False
    learned: float = 0.0
    cures: tuple[Callable[[], Trial], ...] = field(default=(), repr=False)
    begins: int = 1
