"""Small samples of a model's tensors, and what kind of layer they belong to.

Shape legend: R sampled rows of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from esper.grafting.layers.graph import kind_of
from esper.grafting.slot import SLOT_NAME, is_transformed
from esper.health.optimizer_steps import has_numbers

ROWS = 64
COLUMNS = 512
FEW = 64  # elements of a tensor
TABLES = ("Embedding", "EmbeddingBag")  # rows that a batch does not use have no gradient
TRANSPOSED = ("Conv1D", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


def sampled(tensor: Tensor) -> Tensor:
    """A view of at most 64 x 512 elements; of a matrix, rows of one unit each."""
    if tensor.ndim < 2:
        return tensor.reshape(-1)[: ROWS * COLUMNS]
    return tensor[:ROWS].flatten(1)[:, :COLUMNS]


def rows_of(tensor: Tensor) -> Tensor:
    """float [at most 64, at most 512]: features last; of an image, all of it is one row."""
    if tensor.ndim >= 4:
        flat = tensor[:ROWS].flatten(1)
    elif tensor.ndim:
        flat = tensor.reshape(-1, tensor.shape[-1])[:ROWS]
    else:
        flat = tensor.reshape(1, 1)
    return flat[:, :COLUMNS].detach().float()


def is_readable(tensor: Tensor) -> bool:
    if is_transformed(tensor):
        return False
    return tensor.is_floating_point() and has_numbers(tensor) and tensor.numel() > 0


def is_graft(name: str) -> bool:
    """The parameter belongs to a graft, which has rules of its own at birth."""
    return SLOT_NAME in name.split(".")


def plain_kind_of(module: nn.Module) -> str:
    """As ``kind_of``, but a class made from a table or a transposed layer counts as that one."""
    made_from = (kind.__name__ for kind in type(module).__mro__)
    return next((name for name in made_from if name in (*TABLES, *TRANSPOSED)), kind_of(module))


def fan_in(shape: Sequence[int], kind: str) -> int:
    """Number of inputs of one unit."""
    return shape[0] if kind in TRANSPOSED else math.prod(shape[1:])
