"""BP-ALL-REDUCE-SHARD: each rank sums one shard of the gradients, then all gather them."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from esper.blueprints.gradient_reduction import GradientReduction, ReductionBlueprint


class Shards(GradientReduction):
    """A reduce-scatter and an all-gather, beside the backward pass that is still running."""

    def reduce(self, flat: Tensor, group: distributed.ProcessGroup) -> int:
        size = distributed.get_world_size(group)
        padded = _padded(flat, size)
        shards = list(padded.chunk(size))
        own = torch.empty_like(shards[0])
        distributed.reduce_scatter(own, shards, group=group)
        distributed.all_gather(shards, own, group=group)
        if padded is not flat:
            flat.copy_(padded[: flat.numel()])
        # The minimum of the two; the backend chooses the routes.
        return 2 * (size - 1) * own.numel() * own.element_size()


def _padded(flat: Tensor, size: int) -> Tensor:
    missing = -flat.numel() % size
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat


class AllReduceShard(ReductionBlueprint):
    slug = "all_reduce_shard"
    id = "BP-ALL-REDUCE-SHARD"
    title = "Sharded all-reduce"
    idea = "Each rank sums one shard of the gradients, while all ranks gather the sums."
    source = "Rajbhandari et al. 2020, arXiv 1910.02054"
    when = "Many ranks share one bandwidth, and the gradient is large."
    conflicts = frozenset({"ring_allreduce"})

    def make_reduction(self) -> GradientReduction:
        return Shards()
