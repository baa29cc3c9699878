"""Asking the user's own ``evaluate()`` without leaving a trace in the training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from esper.grafting.snapshot import kept_streams

_SHARE = 50  # an evaluation may cost one part in so many of the time between two
_SHORTEST_GAP_STEPS = 100


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: no gradients, eval mode. After: random streams and every module's mode as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), kept_streams():
            yield
    finally:
        model.eval()
        for module in training:
            module.training = True


class Evaluator:
    """``evaluate()`` now and then, and with a graft on and off.

    Args:
        evaluate: held-out loss, lower is better; on the same data at each call. None where there
            is no such data yet.
    """

    def __init__(self, model: nn.Module, evaluate: Callable[[], float | None]) -> None:
        self._model = model
        self._evaluate = evaluate
        self._next_step = _SHORTEST_GAP_STEPS
        self._next_time = 0.0

    def loss(self) -> float:
        """NaN where there is none."""
        with undisturbed(self._model):
            loss = self._evaluate()
        return math.nan if loss is None else float(loss)

    def is_due(self, step: int) -> bool:
        """It is time for a held-out loss again, by steps and by what it costs."""
        return step >= self._next_step and time.monotonic() >= self._next_time

    def due_loss(self, step: int) -> float:
        """The held-out loss; from it counts the time to the next."""
        started = time.monotonic()
        loss = self.loss()
        ended = time.monotonic()
        self._next_step = step + _SHORTEST_GAP_STEPS
        self._next_time = ended + _SHARE * (ended - started)
        return loss

    def ablation_gain(self, without: AbstractContextManager[object]) -> float:
        """Loss without the graft minus loss with it: above zero, it helps.

        Args:
            without: inside it, the graft is switched off.
        """
        on = self.loss()
        with without:
            off = self.loss()
        return off - on
