"""Stable rank by power iteration that continues from the vector of the last sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FIRST_ITERATIONS, NEXT_ITERATIONS = 6, 1


class StableRanks:
    """Remembers each weight's leading vector; it starts from a generator of its own."""

    def __init__(self) -> None:
        self._vectors: dict[int, Tensor] = {}
        self._generator = torch.Generator("cpu").manual_seed(0)

    def of(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """One number of shape [] for each, on its device."""
        return [self._rank(parameter) for parameter in parameters]

    def _rank(self, parameter: nn.Parameter) -> Tensor:
        weight = parameter.detach().flatten(1).float()
        key = id(parameter)
        vector = self._vectors.get(key)
        iterations = NEXT_ITERATIONS
        if vector is None or vector.shape != (weight.shape[1],) or vector.device != weight.device:
            vector = torch.randn(
                weight.shape[1], generator=self._generator, dtype=weight.dtype, device="cpu"
            )
            vector = vector.to(weight.device, non_blocking=True)
            iterations = FIRST_ITERATIONS
        rank, vector = stable_rank(weight, vector, iterations)
        self._vectors[key] = vector
        return rank


def stable_rank(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """‖W‖²_F / ‖W‖²_2 over its largest possible value, and the leading right singular vector.

    Args:
        weight: float [m, n].
        vector: float [n], where the power iteration starts.
        iterations: of W^T W.
    """
    for _ in range(iterations):
        vector = weight.mT @ (weight @ vector)
        vector = vector / vector.norm().clamp_min(1e-30)
    top = (weight @ vector).square().sum()
    # Before the iteration has converged the top value is too small, hence the 1.
    rank = (weight.square().sum() / top / min(weight.shape)).clamp_max(1.0)
    return torch.where(top == 0, torch.zeros_like(rank), rank), vector
