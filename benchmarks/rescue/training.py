"""Trains a case under one arm, and scores it on held-out data while it trains."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.rescue.cases import Trial

SCORED_EVERY = 25  # steps
SCORED_LAST = 3  # scores whose mean counts, so that one lucky step does not
LONGER = 1.25  # steps of a run with a fault / those of its twin


@dataclass
class Outcome:
    """What became of one training.

    Attributes:
        found: slug -> the step at which it was found, findings above info only.
        remedies: (step, remedy, finding, what became of it).
        scores: (step, held-out score).
        cpu_s: CPU time of the process, without the scores.
        steps: of all optimizers, those of restarts too.
    """

    found: dict[str, int] = field(default_factory=dict)
    severe: dict[str, str] = field(default_factory=dict)
    remedies: list[tuple[int, str, str, str]] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    steps: int = 0
    decisions: int = 0

    @property
    def score(self) -> float:
        """Mean of the last scores; NaN where one of them is none."""
        last = [score for _, score in self.scores[-SCORED_LAST:]]
        return statistics.fmean(last) if last else math.nan

    def first_at(self, wanted: float) -> int | None:
        """The first step whose score, and all later ones in the mean, is good enough."""
        for place, (step, score) in enumerate(self.scores):
            later = [value for _, value in self.scores[place:]]
            if score >= wanted and statistics.fmean(later) >= wanted:
                return step
        return None


class Arm:
    """Nothing is done; the other arms do something at one of these places."""

    def begin(self, trial: Trial, outcome: Outcome) -> None:
        self.trial, self.outcome = trial, outcome

    def before_update(self, step: int) -> None:
        pass

    def after_step(self, step: int, loss: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


def train(trial: Trial, steps: int, seed: int, arm: Arm) -> Outcome:
    """Trains ``trial`` for ``steps`` steps. The same seed draws the same batches in each arm."""
    outcome = Outcome(steps=steps)
    generator = torch.Generator().manual_seed(seed)
    arm.begin(trial, outcome)
    spent = -time.process_time()
    try:
        for step in range(1, steps + 1):
            trial.before(trial, step)
            rows = torch.randint(0, len(trial.x), (trial.batch,), generator=generator)
            if (step - 1) % trial.zero_every == 0:
                trial.optimizer.zero_grad()
            loss = trial.loss(trial.model(trial.x[rows]), trial.y[rows])
            if loss.requires_grad:
                torch.autograd.backward(loss)
            arm.before_update(step)
            trial.optimizer.step()
            arm.after_step(step, loss.detach())
            if step % SCORED_EVERY == 0 or step == steps:
                spent += time.process_time()
                outcome.scores.append((step, trial.score()))
                outcome.losses.append(float(loss.detach()))
                spent -= time.process_time()
    finally:
        arm.end()
    outcome.cpu_s = spent + time.process_time()
    return outcome
