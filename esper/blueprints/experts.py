"""One expert beside a layer, with its own gate: the base of two blueprints.

Shape legend: N positions, I channels in, O channels out, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import layout
from esper.blueprints.base import Graft
from esper.blueprints.feedforward import (
    FeedForward,
    GeluBranch,
    GeluFeedForward,
    SwigluBranch,
    SwigluFeedForward,
)
from esper.blueprints.initial import Initializer
from esper.blueprints.pointwise import project
from esper.blueprints.routing import Router
from esper.contracts import AdaptationType, BlueprintCategory, LayerInfo

FLOAT32_BYTES = 4


class Expert(Graft):
    """``y + gate · E(x)``, the gate depends on a learnt key; k and E start at zero.

    Alone, the gate is ``2 σ(k · x)``, which starts at one. In a slot with an older router it joins
    the router: the gate is then its share ``exp(k · x) / (exp(k · x) + Σ exp(logit_e))`` of a
    softmax over the router's experts and itself. The router's choice and gates do not change,
    because a new expert that replaced a trained one would change the output. For the same reason an
    expert that is older than the router keeps its own gate.
    """

    channel_axis: int
    stride: tuple[int, ...]

    def __init__(self, branch: GeluBranch | SwigluBranch, key: nn.Parameter) -> None:
        super().__init__()
        self.branch = branch
        self.key = key  # [1, I]
        # In a tuple, so that it is not registered as a child.
        self._routers: tuple[Router, ...] = ()

    def join(self, neighbours: Sequence[Graft]) -> None:
        older = [n for n in neighbours[: list(neighbours).index(self)] if isinstance(n, Router)]
        self._routers = tuple(older[-1:])

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        change = self.branch.change(x)
        return y + (change * self._gate(x).to(change.dtype)).to(y.dtype)

    def _gate(self, x: Tensor) -> Tensor:
        """[N, 1], float32 at least; the 1 replaces the channels."""
        score = project(
            layout.as_weight_dtype(x, self.key),
            self.key,
            channel_axis=self.branch.channel_axis,
            stride=self.branch.stride,
        )
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        for router in self._routers:
            others = router.logits(x).logsumexp(dim=router.channel_axis, keepdim=True)
            return torch.sigmoid(score - others)
        return 2.0 * torch.sigmoid(score)


class GatedBranch(FeedForward):
    """Adds the key and the gate to a feed-forward branch, and their cost."""

    category = BlueprintCategory.MIXTURE_OF_EXPERTS
    adaptation_type = AdaptationType.ADD_MOE

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return super().parameters(layer, config) + layer.features_in

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        """For a gate of its own; with a router, the router's logits are computed once more."""
        rows = layout.position_count(layer, of_output=True)
        return super().flops(layer, config) + 2 * rows * layer.features_in

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        # Also kept: the branch's output, and the gate before and after it is doubled.
        rows = layout.position_count(layer, of_output=True)
        width = layout.dtype_bytes(layer)
        gate = rows * (width + max(width, FLOAT32_BYTES))
        return super().activation_bytes(layer, config) + rows * layer.features_out * width + gate

    @staticmethod
    def joining(layer: LayerInfo, experts: int) -> tuple[int, int]:
        """(operations, kept bytes) that a router with so many experts adds to the gate."""
        rows = layout.position_count(layer, of_output=True)
        kept = rows * experts * max(layout.dtype_bytes(layer), FLOAT32_BYTES)
        return 2 * rows * layer.features_in * experts, kept

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        branch = self.make_branch(layer, config, weights)
        return Expert(branch, weights.zeros(1, layer.features_in))


class GeluExpert(GatedBranch, GeluFeedForward):
    """Builds an :class:`Expert` with a :class:`GeluBranch`."""


class SwigluExpert(GatedBranch, SwigluFeedForward):
    """Builds an :class:`Expert` with a :class:`SwigluBranch`."""
