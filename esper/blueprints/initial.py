"""Initial weights that use no global random stream.

A graft may be built in a background thread while the host trains, so ``manual_seed`` and
``fork_rng`` on the global stream would affect the host's dropout. Numbers are drawn in float32 on
the CPU from a separate generator, so that one seed gives the same weights on every device and dtype
(up to the dtype's rounding).
"""

from __future__ import annotations

import math

import torch
from torch import nn


class Initializer:
    """Creates a graft's parameters in a fixed order from one seed."""

    def __init__(self, seed: int, *, device: torch.device | str | None, dtype: torch.dtype) -> None:
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        self.device = torch.device(device or "cpu")
        self._dtype = dtype

    def uniform(self, *shape: int, fan_in: int = 0) -> nn.Parameter:
        """Kaiming-uniform with a = √5, as nn.Linear does: U(±1/√fan_in).

        Args:
            fan_in: if it is not the product of ``shape[1:]``.
        """
        bound = 1.0 / math.sqrt(fan_in or max(1, math.prod(shape[1:])))
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        values.uniform_(-bound, bound, generator=self._generator)
        return nn.Parameter(values.to(device=self.device, dtype=self._dtype))

    def integer(self) -> int:
        """An integer from 0 to 2³¹ that differs by seed."""
        return int(torch.randint(1 << 31, (), generator=self._generator, device="cpu"))

    def zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, device=self.device, dtype=self._dtype))

    def ones(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(shape, device=self.device, dtype=self._dtype))
