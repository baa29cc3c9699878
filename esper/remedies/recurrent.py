"""Recurrent weights that make a signal grow from step to step of a sequence.

Shape legend: B rows, T steps of a sequence, H hidden units.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

GROWS = 10.0  # size at the end of a sequence / at its beginning, above which weights are scaled
ROUNDS = 12
FEWEST_STEPS = 8


def scale_recurrent(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> float:
    """Scales the recurrent weights so that the output keeps its size over the sequence.

    What is multiplied by g in each step is multiplied by g**T in T of them, so the weights are
    divided by g. Only with a ReLU do they grow: the other units are bounded.

    Returns:
        The factor of the weights; 1: nothing was changed.
    """
    if not isinstance(module, nn.RNN) or not args or not isinstance(args[0], Tensor):
        return 1.0
    total = 1.0
    for _ in range(ROUNDS):
        growth = _growth(module, module(*args, **kwargs)[0])
        if growth == 1.0:
            break
        factor = 0.1 if math.isinf(growth) else 1.0 / growth
        for name, weight in module.named_parameters():
            if name.startswith("weight_hh"):
                weight.mul_(factor)
        total *= factor
    return total


def _growth(module: nn.RNN, output: Tensor) -> float:
    """By which factor the output grows in one step; 1 where it stays within ten times its size."""
    axis = output.ndim - 2 if module.batch_first or output.ndim == 2 else 0
    steps = output.movedim(axis, 0)  # [T, B, H]
    if len(steps) < FEWEST_STEPS:
        return 1.0
    part = len(steps) // 4
    first, last = (float(h.double().square().mean().sqrt()) for h in (steps[:part], steps[-part:]))
    if not math.isfinite(last):
        return math.inf
    if not 0 < GROWS * first < last:
        return 1.0
    return float((last / first) ** (1.0 / (len(steps) - part)))
