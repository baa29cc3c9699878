"""BP-RING-ALLREDUCE: sums gradients around a ring of ranks."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from esper.blueprints.gradient_reduction import GradientReduction, ReductionBlueprint


class Ring(GradientReduction):
    """Each rank communicates only with its two neighbours, and sends 2 (n - 1) / n of the gradient.

    The first round sums the chunks, the second distributes the sums. Both sending and receiving
    start before waiting for either, so no ring size can deadlock.
    """

    def reduce(self, flat: Tensor, group: distributed.ProcessGroup) -> int:
        rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        chunks = flat.tensor_split(size)  # sizes that differ by one, some empty
        arrived = torch.empty_like(chunks[0])
        sent = 0
        for turn in range(size - 1):
            mine, theirs = chunks[(rank - turn) % size], chunks[(rank - turn - 1) % size]
            incoming = arrived[: theirs.numel()]
            sent += _pass_on(mine, incoming, rank, group)
            theirs.add_(incoming)
        for turn in range(size - 1):
            mine, theirs = chunks[(rank - turn + 1) % size], chunks[(rank - turn) % size]
            sent += _pass_on(mine, theirs, rank, group)
        return sent


def _pass_on(outgoing: Tensor, incoming: Tensor, rank: int, group: distributed.ProcessGroup) -> int:
    """Sends to the right while receiving from the left; both ranks know which chunks are empty."""
    size = distributed.get_world_size(group)
    works = []
    if incoming.numel():
        works.append(distributed.irecv(incoming, group=group, group_src=(rank - 1) % size))
    if outgoing.numel():
        works.append(distributed.isend(outgoing, group=group, group_dst=(rank + 1) % size))
    for work in works:
        if work is not None:
            work.wait()
    return outgoing.numel() * outgoing.element_size()


class RingAllreduce(ReductionBlueprint):
    slug = "ring_allreduce"
    id = "BP-RING-ALLREDUCE"
    title = "Ring all-reduce"
    idea = "Gradients are summed in chunks that travel around a ring of neighbouring ranks."
    source = "Sergeev & Del Balso 2018, arXiv 1802.05799; Patarasuk & Yuan 2009"
    when = "Links between neighbours are fast, and the gradient is large for the number of ranks."
    conflicts = frozenset({"all_reduce_shard"})

    def make_reduction(self) -> GradientReduction:
        return Ring()
