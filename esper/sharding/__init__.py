"""Models whose parameters are spread over ranks: FSDP, FSDP2, tensor parallelism, DeepSpeed."""

from esper.sharding.frame_sum import FrameSum
from esper.sharding.kinds import Kind, is_dtensor, kind_of, why_no_graft
from esper.sharding.layout import (
    Layout,
    Part,
    group_ranks,
    local,
    named_holders,
    original_name,
    parts_of,
)

__all__ = [
    "FrameSum",
    "Kind",
    "Layout",
    "Part",
    "group_ranks",
    "is_dtensor",
    "kind_of",
    "local",
    "named_holders",
    "original_name",
    "parts_of",
    "why_no_graft",
]
