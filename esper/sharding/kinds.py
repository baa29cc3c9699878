"""Which library spreads a model's parameters over ranks, and what Esper can do with it.

Everything is recognised by its class name or a mark on a parameter: DeepSpeed may not be installed,
and torch's own modules are imported only where a script has imported them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from torch import Tensor, nn


class Kind(StrEnum):
    """The libraries that are known, as people call them."""

    FSDP = "FSDP (FullyShardedDataParallel)"
    FSDP2 = "FSDP2 (fully_shard)"
    TENSOR_PARALLEL = "tensor parallelism (DTensor)"
    ZERO = "DeepSpeed ZeRO"


_NO_GRAFT = {
    Kind.FSDP: "FullyShardedDataParallel keeps its weights in one flat tensor, which accepts no "
    "new ones: use fully_shard (FSDP2) or DistributedDataParallel",
    Kind.TENSOR_PARALLEL: "tensor parallelism splits its weights, and a graft would have to be "
    "split in the same way: use fully_shard (FSDP2) alone, or DistributedDataParallel",
    Kind.ZERO: "DeepSpeed trains flat tensors of its own in place of its weights, which accept "
    "no new ones: use fully_shard (FSDP2) or DistributedDataParallel",
}


def kind_of(model: nn.Module) -> Kind | None:
    """How the model's parameters are spread; None for a model that each rank holds whole."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if "FullyShardedDataParallel" in kinds:
        return Kind.FSDP
    parameters = list(model.parameters())
    if "DeepSpeedEngine" in kinds or any(hasattr(p, "ds_id") for p in parameters):
        return Kind.ZERO
    if any(is_dtensor(p) and _is_split_by_hand(p) for p in parameters):
        return Kind.TENSOR_PARALLEL
    if "FSDPModule" in kinds:
        return Kind.FSDP2
    return Kind.TENSOR_PARALLEL if any(map(is_dtensor, parameters)) else None


def why_no_graft(kind: Kind | None) -> str:
    """Why such a model takes no graft, with the way out; empty where it does."""
    return "" if kind is None else _NO_GRAFT.get(kind, "")


def is_fsdp_module(module: nn.Module) -> bool:
    """``fully_shard`` was called with it."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def is_dtensor(tensor: Tensor) -> bool:
    """A distributed tensor: each rank holds a part of it."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def _is_split_by_hand(tensor: Any) -> bool:
    """On a mesh with more axes than fully_shard's: tensor or expert parallelism too."""
    names = tensor.device_mesh.mesh_dim_names or ()
    strided = any("Strided" in type(placement).__name__ for placement in tensor.placements)
    return strided or "tp" in names
