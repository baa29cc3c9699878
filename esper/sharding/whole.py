"""Whole tensors for a checkpoint, and the way back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from esper.sharding.kinds import is_dtensor


def gathered(value: Any) -> Any:
    """A copy of a tree of dicts, lists and tensors, with every distributed tensor whole.

    A collective call where there is one.
    """
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(gathered, value))
    if not isinstance(value, Tensor):
        return value
    spread: Any = value
    whole: Tensor = spread.full_tensor() if is_dtensor(value) else value
    return whole.detach().clone()


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as ``like`` is over the ranks, which all have the same ``value``.

    No collective call.
    """
    if not is_dtensor(like) or is_dtensor(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    model: Any = like
    there = value.to(model._local_tensor.device)
    return distribute_tensor(there, model.device_mesh, model.placements, src_data_rank=None)
