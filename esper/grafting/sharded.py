"""The ranks of one model whose parameters are spread over them."""

from __future__ import annotations

import hashlib

import torch
from torch import distributed, nn

from esper.grafting.replicas import RankGroup, control_group
from esper.sharding import Kind, Layout, group_ranks, why_no_graft


class ShardedRanks(RankGroup):
    """The ranks over which a model is spread. Creating it is a collective call.

    Attributes:
        layout: which part of each parameter lies on this rank.
        background: a second group, for sums that go on while the ranks exchange messages: in one
            group their order would have to be the same on all ranks.
    """

    meets_each_step = False
    layout: Layout

    def __init__(self, model: nn.Module, kind: Kind) -> None:
        ranks = group_ranks(model)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        super().__init__(control_group(ranks, distributed.group.WORLD, device))
        self.background = control_group(ranks, distributed.group.WORLD, device)
        self.layout = Layout(model, kind, self.size)

    def why_not(self) -> str:
        """Why such a model takes no graft and no remedy, with the way out; empty if it does."""
        reason = why_no_graft(self.layout.kind)
        return f"the model cannot be changed: {reason}" if reason else ""

    def parameters_changed(self) -> None:
        """Nothing to adapt: gradients are summed by the parameters themselves."""

    def checksum(self) -> str:
        """Hex SHA-256 over names and whole shapes; the numbers differ from rank to rank."""
        return hashlib.sha256(self.layout.describe().encode()).hexdigest()
