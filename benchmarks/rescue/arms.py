"""What is done with a run that may have a fault."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import esper
from benchmarks.rescue.cases import Case, Trial
from benchmarks.rescue.training import LONGER, Arm, Outcome, train
from esper.contracts import Severity
from esper.exceptions import EsperError
from esper.remedies import list_remedies


class Esper(Arm):
    """Esper is attached; in ``supervised`` mode everything that it proposes is approved."""

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def begin(self, trial: Trial, outcome: Outcome) -> None:
        super().begin(trial, outcome)
        evaluate = trial.held_out_loss if trial.evaluates else None
        self.session = esper.attach(
            trial.model,
            trial.optimizer,
            mode=self._mode,  # type: ignore[arg-type]
            evaluate=evaluate,
            verbose=False,
        )

    def after_step(self, step: int, loss: Tensor) -> None:
        self.session.step(loss)
        for finding in self.session.findings():
            if finding.severity is not Severity.INFO:
                slug = finding.slug or str(finding.rule)
                self.outcome.found.setdefault(slug, step)
                self.outcome.severe[slug] = str(finding.severity)
        if self._mode == "supervised":
            self._approve()

    def end(self) -> None:
        loop = self.session._parts.remedies
        for treatment in loop.treatments if loop is not None else ():
            self.outcome.remedies.append(
                (treatment.step, treatment.remedy, treatment.finding, treatment.ended or "in force")
            )
        self.session.close()

    def _approve(self) -> None:
        for remedy in self.session.proposed_remedies:
            self.outcome.decisions += 1
            try:
                self.session.approve(remedy)
            except (EsperError, ValueError):
                self.session.reject(remedy)
        for graft in self.session.waiting:
            self.outcome.decisions += 1
            try:
                self.session.approve(graft)
            except (EsperError, ValueError):
                self.session.reject(graft)


class RandomRemedies(Esper):
    """Remedies at the steps at which Esper gave one, but which, where and how much is drawn."""

    def __init__(self, steps: Sequence[int], seed: int) -> None:
        super().__init__("observe")
        self._at = list(steps) or [50]
        self._dice = random.Random(f"remedies {seed}")

    def after_step(self, step: int, loss: Tensor) -> None:
        self.session.step(loss)
        for _ in range(self._at.count(step)):
            self._give(step)

    def _give(self, step: int) -> None:
        for _ in range(10):
            slug, layer, config = self._draw()
            try:
                sample = self.trial.x[: self.trial.batch]
                self.session.remedy(slug, layer, sample=sample, **config)
            except (EsperError, ValueError):
                continue
            self.outcome.remedies.append((step, slug, "drawn", str(config)))
            return

    def _draw(self) -> tuple[str, str, dict[str, Any]]:
        remedy = self._dice.choice(list_remedies())
        named = [layer.name for layer in self.session.layers]
        on_layer = remedy.scope == "layer" and bool(named)
        layer = self._dice.choice(named) if on_layer else ""
        doses: dict[str, dict[str, Any]] = {
            "set_lr": {"factor": 10.0 ** self._dice.uniform(-4, 4)},
            "rewind": {"factor": 10.0 ** self._dice.uniform(-4, 0)},
            "weight_decay": {"value": 10.0 ** self._dice.uniform(-4, -1)},
        }
        return remedy.slug, layer, doses.get(remedy.slug, {})


class PlateauAndClip(Arm):
    """Clips the gradient's norm to 1, and halves the rate when the loss does not fall."""

    def begin(self, trial: Trial, outcome: Outcome) -> None:
        super().begin(trial, outcome)
        self._schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            trial.optimizer, factor=0.5, patience=2
        )
        self._losses: list[float] = []

    def before_update(self, step: int) -> None:
        nn.utils.clip_grad_norm_(self.trial.model.parameters(), 1.0)

    def after_step(self, step: int, loss: Tensor) -> None:
        self._losses.append(float(loss))
        if step % 50 == 0:
            self._schedule.step(sum(self._losses[-50:]) / 50)


class ZClip(Arm):
    """Clips by the z-score of the gradient's norm; arXiv 2504.02507."""

    DECAY, LIMIT, WARM_UP = 0.97, 2.5, 25

    def begin(self, trial: Trial, outcome: Outcome) -> None:
        super().begin(trial, outcome)
        self._first: list[float] = []
        self._mean = self._variance = math.nan

    def before_update(self, step: int) -> None:
        gradients = [p.grad for p in self.trial.model.parameters() if p.grad is not None]
        if not gradients:
            return
        norm = float(nn.utils.get_total_norm(gradients))
        if len(self._first) < self.WARM_UP:
            self._first.append(norm)
            values = torch.tensor(self._first)
            self._mean, self._variance = float(values.mean()), float(values.var(unbiased=False))
            return
        deviation = math.sqrt(self._variance) + 1e-12
        z = (norm - self._mean) / deviation
        if z > self.LIMIT:
            allowed = self._mean + self.LIMIT**2 / z * deviation
            torch._foreach_mul_(gradients, allowed / norm)
            norm = allowed
        self._mean = self.DECAY * self._mean + (1 - self.DECAY) * norm
        spread = (norm - self._mean) ** 2
        self._variance = self.DECAY * self._variance + (1 - self.DECAY) * spread


class GivenRemedy(Esper):
    """One remedy that is known to fit the fault, early in the run."""

    def __init__(self, slug: str, config: dict[str, Any], at: int = 10) -> None:
        super().__init__("observe")
        self._slug, self._config, self._given_at = slug, config, at

    def after_step(self, step: int, loss: Tensor) -> None:
        self.session.step(loss)
        if step == self._given_at:
            sample = self.trial.x[: self.trial.batch]
            with contextlib.suppress(EsperError, ValueError):
                self.session.remedy(self._slug, sample=sample, **self._config)


ORACLE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("repair_scale", {}),
    ("set_lr", {"factor": 1000.0}),
    ("rewind", {"step": 0, "factor": 0.1}),
    ("rewind", {"step": 0, "factor": 0.01}),
    ("rewind", {"step": 0, "factor": 0.003}),
)


def oracle(case: Case, wanted: float) -> Outcome:
    """The best of a few single remedies, each tried in a run of its own; ends at the first fit."""
    best: Outcome | None = None
    for slug, config in ORACLE:
        steps = round(case.steps * LONGER)
        tried = train(case.faulty(), steps, case.seed, GivenRemedy(slug, config))
        if best is None or not best.score >= tried.score:
            best = tried
        if tried.score >= wanted:
            break
    assert best is not None
    return best


def restart(case: Case, wanted: float, told_at: int | None) -> Outcome:
    """Begins anew with AutoTrainer's cures in its order, until one is good enough.

    The first run costs the steps until the fault was told, each other one all of its steps.
    """
    first = case.steps if told_at is None else told_at
    best, spent, cpu_s = Outcome(), first, 0.0
    for cure in case.cures:
        tried = train(cure(), case.steps, case.seed, Arm())
        spent, cpu_s = spent + case.steps, cpu_s + tried.cpu_s
        if not best.scores or not best.score >= tried.score:
            best = tried
        if tried.score >= wanted:
            break
    best.steps, best.cpu_s = spent, cpu_s
    return best
