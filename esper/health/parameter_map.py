"""Which parameters belong to which layer, so that one fused call serves all layers.

Shape legend: L layers, P parameters of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from esper.health.optimizer_steps import has_numbers

GRAFT_MARK = "esper"  # a layer's grafts live in its child of this name


@dataclass(slots=True)
class ParameterMap:
    """Which parameters belong to which layer, flat, so that one fused call serves all layers.

    A parameter may belong to several layers (a block and its parts), or to none.
    """

    parameters: list[nn.Parameter]
    layers: int
    host_rows: np.ndarray  # layer of each (layer, host parameter) pair
    host_columns: np.ndarray  # parameter of each pair
    graft_rows: np.ndarray
    graft_columns: np.ndarray
    matrices: dict[int, int] = field(default_factory=dict)  # layer -> parameter: its weight

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str]) -> ParameterMap:
        modules = dict(model.named_modules())
        columns: dict[int, int] = {}
        parameters: list[nn.Parameter] = []
        host: list[tuple[int, int]] = []
        graft: list[tuple[int, int]] = []
        matrices: dict[int, int] = {}
        for row, name in enumerate(names):
            module = modules.get(name)
            if module is None:
                continue
            largest = 0
            for path, parameter in module.named_parameters():
                if not has_numbers(parameter):
                    continue
                if id(parameter) not in columns:
                    columns[id(parameter)] = len(parameters)
                    parameters.append(parameter)
                column = columns[id(parameter)]
                parts = path.split(".")
                (graft if GRAFT_MARK in parts else host).append((row, column))
                if len(parts) == 1 and parameter.ndim >= 2 and parameter.numel() > largest:
                    largest = parameter.numel()
                    matrices[row] = column
        return cls.of_pairs(parameters, len(names), host, graft, matrices=matrices)

    @classmethod
    def of_pairs(
        cls,
        parameters: list[nn.Parameter],
        layers: int,
        host: list[tuple[int, int]],
        graft: list[tuple[int, int]],
        **more: Any,
    ) -> Self:
        """From (layer, parameter) pairs of the host's and the grafts' parameters."""
        return cls(parameters, layers, *_pairs(host), *_pairs(graft), **more)

    @property
    def sizes_P(self) -> np.ndarray:
        """float64 [P]: elements of each parameter."""
        return np.array([parameter.numel() for parameter in self.parameters], dtype=np.float64)

    def host_sums(self, per_parameter_P: np.ndarray) -> np.ndarray:
        """float64 [L]: sums over each layer's known host parameters, NaN where none is known."""
        return _sums(per_parameter_P, self.host_rows, self.host_columns, self.layers)

    def graft_sums(self, per_parameter_P: np.ndarray) -> np.ndarray:
        """float64 [L]: the same over each layer's grafts."""
        return _sums(per_parameter_P, self.graft_rows, self.graft_columns, self.layers)

    def of_no_optimizer(self, optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
        """Parameters that none of the optimizers holds."""
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        held = {id(parameter) for group in groups for parameter in group["params"]}
        return [parameter for parameter in self.parameters if id(parameter) not in held]


def _pairs(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _sums(
    per_parameter_P: np.ndarray, rows: np.ndarray, columns: np.ndarray, layers: int
) -> np.ndarray:
    picked = per_parameter_P[columns]
    known = ~np.isnan(picked)
    total_L = np.bincount(rows[known], weights=picked[known], minlength=layers)
    count_L = np.bincount(rows[known], minlength=layers)
    return np.where(count_L > 0, total_L, np.nan)
