"""Shape, address and numbers of any tensor that a process may hold, also of unusual ones."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Shape: TypeAlias = tuple[int, ...] | None


def shape_of(tensor: Tensor) -> Shape:
    """None: it is nested, or not initialized yet."""
    try:
        return tuple(tensor.shape)
    except RuntimeError:
        return None


def address_of(tensor: Tensor) -> int:
    """Of its memory; 0: it has none that can be asked for, as a sparse one."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that hold its numbers, new ones; of a dense tensor, itself."""
    if tensor.is_nested:
        return [tensor.values()]
    match tensor.layout:
        case torch.sparse_coo:
            return [tensor._indices(), tensor._values()]
        case torch.sparse_csr | torch.sparse_bsr:
            return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        case torch.sparse_csc | torch.sparse_bsc:
            return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
        case torch.strided:
            return [tensor]
        case _:
            return [tensor.to_dense()]
