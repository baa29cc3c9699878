"""Models whose parameters are spread over ranks: FSDP, FSDP2, tensor parallelism, DeepSpeed."""

from esper.sharding.frame_sum import FrameSum
from esper.sharding.kinds import Kind, is_dtensor, is_fsdp_module, kind_of, why_no_graft
from esper.sharding.layout import (
    Layout,
    Part,
    fsdp_groups,
    group_ranks,
    local,
    named_holders,
    original_name,
    parts_of,
)
from esper.sharding.whole import gathered, spread_like

__all__ = [
    "FrameSum",
    "Kind",
    "Layout",
    "Part",
    "fsdp_groups",
    "gathered",
    "group_ranks",
    "is_dtensor",
    "is_fsdp_module",
    "kind_of",
    "local",
    "named_holders",
    "original_name",
    "parts_of",
    "spread_like",
    "why_no_graft",
]
