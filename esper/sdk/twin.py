"""Trains a copy of the run with a graft and one without it, on the same batches.

    for batch in batches (again from the first where there are too few):
        one step of each copy, with the same random numbers
        now and then: the held-out loss of both
    until steps or seconds are over

The run itself is not touched: not its weights, its optimizer, its modes or its random streams. Both
copies keep the learning rate of this moment. The work is done where it is called, at a step
boundary, and costs at most ``seconds``, plus the step or evaluation that is under way.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esper.contracts.percent import signed
from esper.exceptions import ConfigurationError
from esper.grafting import Receipt
from esper.grafting.layers.evaluation_mode import undisturbed
from esper.grafting.tensors.random_streams import RandomStreams, kept_streams
from esper.reward.sequence import Interval, trend_at_every_look

LOOKS = 12  # held-out losses of each copy, at most

Loss = Callable[[nn.Module, Any], Tensor]
HeldOut = Callable[[nn.Module], float]


@dataclass(frozen=True, slots=True)
class Twin:
    """A graft against the same training without it.

    Attributes:
        gain, low, high: of the held-out loss, a share, with its 95 % interval; infinite bounds
            where there were too few looks.
        steps: that both copies were trained.
        looks: held-out losses of each.
        seconds: what it cost.
    """

    layer: str
    blueprint: str
    gain: float
    low: float
    high: float
    steps: int
    looks: int
    seconds: float

    def helps(self, smallest: float) -> bool | None:
        """The gain is shown to be above ``smallest``, or below it; None: neither is shown."""
        if self.low > smallest:
            return True
        return False if self.high < smallest else None

    def __str__(self) -> str:
        return (
            f"{self.blueprint} at {self.layer}: gain {signed(self.gain)} (95%: "
            f"{signed(self.low)} to {signed(self.high)}) against a twin, {self.steps:,} steps in "
            f"{self.seconds:.1f} s"
        )


def train_twin(
    model: nn.Module,
    optimizer: Any,
    graft: Callable[[nn.Module, Any], Receipt],
    *,
    batches: Sequence[Any],
    loss: Loss,
    evaluate: HeldOut,
    steps: int,
    seconds: float,
) -> Twin:
    """Forks a training and trains both ways.

    Args:
        optimizer: one, which trains all of ``model``.
        graft: puts the graft into the copy that it is given.
        batches: recorded ones; they are used in this order.
        loss: the training loss of a model for a batch.
        evaluate: the held-out loss of a model, lower is better, always on the same data.
        steps: of both copies, at most.
        seconds: for all of it, at most.

    Raises:
        ConfigurationError: there is no batch, or a budget is not above zero.
        The errors of ``graft``; the run is as before in any case.
    """
    if not seconds > 0:
        raise ConfigurationError(f"seconds must be above 0, got {seconds}")
    training = TwinTraining(
        model, optimizer, graft, batches=batches, loss=loss, evaluate=evaluate, steps=steps
    )
    training.advance(seconds - training.seconds)
    return training.result()


class TwinTraining:
    """Both copies, trained in as many slices as the caller has time for.

    Args:
        as for :func:`train_twin`.

    Attributes:
        seconds: what it has cost so far.

    Raises:
        ConfigurationError: there is no batch, or ``steps`` is not above zero.
        The errors of ``graft``; the run is as before in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        graft: Callable[[nn.Module, Any], Receipt],
        *,
        batches: Sequence[Any],
        loss: Loss,
        evaluate: HeldOut,
        steps: int,
    ) -> None:
        if not len(batches):
            raise ConfigurationError("a twin needs at least one recorded batch")
        if steps < 1:
            raise ConfigurationError(f"steps must be above 0, got {steps}")
        self._batches, self._loss, self._evaluate, self._steps = batches, loss, evaluate, steps
        self._every, self._done = max(1, steps // LOOKS), 0
        self._shares: list[tuple[int, float]] = []
        started = time.monotonic()
        with kept_streams():
            plain = copy.deepcopy((model, optimizer))
            grafted = copy.deepcopy((model, optimizer))
            self._receipt = graft(*grafted)
            self._streams = RandomStreams.read()
        self._arms = (plain, grafted)
        self.seconds = time.monotonic() - started

    @property
    def over(self) -> bool:
        return self._done >= self._steps

    def advance(self, seconds: float) -> None:
        """Train on for so long, plus the step or evaluation that is under way then."""
        started = time.monotonic()
        with kept_streams():
            self._streams.restore()
            while not self.over and time.monotonic() - started < seconds:
                self._step()
            self._streams = RandomStreams.read()
        self.seconds += time.monotonic() - started

    def _step(self) -> None:
        _paired_step(self._arms, self._batches[self._done % len(self._batches)], self._loss)
        self._receipt.graft.on_step()
        self._done += 1
        if self._done % self._every == 0:
            self._shares.append((self._done, _gain(self._arms, self._evaluate)))

    def result(self) -> Twin:
        """What both copies have shown so far."""
        interval = _interval(self._shares)
        return Twin(
            layer=self._receipt.layer,
            blueprint=self._receipt.blueprint,
            gain=interval.mean,
            low=interval.low,
            high=interval.high,
            steps=self._done,
            looks=len(self._shares),
            seconds=self.seconds,
        )


def _paired_step(arms: Sequence[tuple[nn.Module, Any]], batch: Any, loss: Loss) -> None:
    """One step of each, with the same random numbers."""
    before = RandomStreams.read()
    for model, optimizer in arms:
        before.restore()
        with torch.enable_grad():
            optimizer.zero_grad()
            torch.autograd.backward(loss(model, batch))
            optimizer.step()


def _gain(arms: Sequence[tuple[nn.Module, Any]], evaluate: HeldOut) -> float:
    """By how much the second is better, a share of the first's held-out loss."""
    losses = []
    before = RandomStreams.read()
    for model, _ in arms:
        with undisturbed(model):
            before.restore()
            losses.append(float(evaluate(model)))
    before.restore()
    off, on = losses
    return (off - on) / abs(off) if off and math.isfinite(off) else math.nan


def _interval(shares: Sequence[tuple[int, float]]) -> Interval:
    known = [(step, share) for step, share in shares if math.isfinite(share)]
    if not known:
        return Interval()
    steps_T = np.array([step for step, _ in known], dtype=np.int64)
    return trend_at_every_look(steps_T, np.array([share for _, share in known])).interval
