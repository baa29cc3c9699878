"""One training, and what it cost."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.benefit.hosts import Host, Rows

SCORED_EVERY = 50  # steps
SCORED_LAST = 5  # scores whose mean is the loss at the end

Curve = list[tuple[int, float]]


@dataclass
class Run:
    """A model in training.

    Attributes:
        offset: batches of this run's first step are those of the step ``offset + 1``.
        curve: (own step, loss on the rows of the report).
        cpu: (own step, CPU seconds until then, without the scores).
    """

    host: Host
    rows: Rows
    model: nn.Module
    optimizer: torch.optim.Optimizer
    offset: int = 0
    steps: int = 0
    cpu_s: float = 0.0
    curve: Curve = field(default_factory=list)
    cpu: Curve = field(default_factory=list)
    evaluations: int = 0

    @classmethod
    def new(
        cls, host: Host, rows: Rows, seed: int, rate: float, extra: int = 0, offset: int = 0
    ) -> Run:
        torch.manual_seed(seed)
        model = host.make(extra)
        return cls(host, rows, model, torch.optim.Adam(model.parameters(), lr=rate), offset)

    def fork(self) -> Run:
        """An independent copy of model and optimizer, whose steps and costs begin at 0."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return Run(self.host, self.rows, model, optimizer, self.offset + self.steps)

    def change_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def train(self, steps: int, each: Callable[[float], bool] | None = None) -> None:
        """``each`` is called with the loss of every step; the training ends where it says so."""
        x, y = self.rows.train
        started = time.process_time()
        for _ in range(steps):
            rows = self.rows.drawn[(self.offset + self.steps) % len(self.rows.drawn)]
            self.optimizer.zero_grad()
            loss = self.host.loss(self.model(x[rows]), y[rows])
            torch.autograd.backward(loss)
            self.optimizer.step()
            self.steps += 1
            done = each is not None and each(loss.item())
            if self.steps % SCORED_EVERY == 0:
                self.cpu_s += time.process_time() - started
                self.curve.append((self.steps, self.loss_on(self.rows.report)))
                self.cpu.append((self.steps, self.cpu_s))
                started = time.process_time()
            if done:
                break
        self.cpu_s += time.process_time() - started

    def evaluate(self) -> float:
        """For Esper."""
        self.evaluations += 1
        return self.loss_on(self.rows.judge)

    @torch.no_grad()
    def loss_on(self, data: tuple[Tensor, Tensor]) -> float:
        self.model.eval()
        loss = self.host.loss(self.model(data[0]), data[1]).item()
        self.model.train()
        return loss

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def level(curve: Curve, at: float = math.inf) -> float:
    """Mean of the last scores until a step; NaN where there are none."""
    known = [loss for step, loss in curve if step <= at]
    return float(np.mean(known[-SCORED_LAST:])) if known else math.nan


def step_flops(run: Run) -> int:
    """Floating-point operations of forward and backward pass on one batch. Forgets gradients."""
    x, y = run.rows.train
    rows = run.rows.drawn[0]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(run.host.loss(run.model(x[rows]), y[rows]))
    run.optimizer.zero_grad()
    return int(counter.get_total_flops())


def evaluation_flops(run: Run) -> int:
    """Of one held-out loss."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run.model(run.rows.judge[0])
    return int(counter.get_total_flops())
