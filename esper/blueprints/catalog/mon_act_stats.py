"""BP-MON-ACT-STATS: measures one layer's activations and changes nothing.

Shape legend: C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from esper.blueprints.base import Blueprint, Graft, check_integer
from esper.blueprints.initial import Initializer
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, LayerInfo, Risk, Signal

DEAD_BELOW = 0.025  # of the layer's mean |h|, as in ReDo, arXiv 2302.12902
_MEASURED = (Signal.ACT_MEAN, Signal.ACT_STD, Signal.DEAD_FRACTION)


class ActivationStatistics(Graft):
    """Every ``every`` calls: mean, std and share of dead channels of ``y``."""

    def __init__(self, *, every: int, channel_axis: int) -> None:
        super().__init__()
        self.every = every
        self.channel_axis = channel_axis
        self.calls = 0
        # Not a buffer: a measurement belongs neither to the model's state nor to its digest.
        self.latest: Tensor | None = None  # float32 [3]

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        if self.calls % self.every == 0:
            self.latest = self._measure(y.detach())
        self.calls += 1
        return y

    def signals(self) -> dict[str, float]:
        values = [math.nan] * len(_MEASURED) if self.latest is None else self.latest.tolist()
        return dict(zip(map(str, _MEASURED), values, strict=True))

    def forget(self) -> None:
        self.calls = 0
        self.latest = None

    @torch.no_grad()
    def _measure(self, y: Tensor) -> Tensor:
        h = y.float()
        others = [axis for axis in range(h.dim()) if axis != self.channel_axis % h.dim()]
        strength_C = h.abs().mean(dim=others)
        dead = (strength_C <= DEAD_BELOW * strength_C.mean()).float().mean()
        return torch.stack([h.mean(), h.std(correction=0), dead])


class MonActStats(Blueprint):
    slug = "mon_act_stats"
    id = "BP-MON-ACT-STATS"
    title = "Activation statistics"
    category = BlueprintCategory.DIAGNOSTICS
    kind = GraftKind.OBSERVE
    adaptation_type = AdaptationType.ADD_DIAGNOSTIC
    risk = Risk.NONE
    trainable = False
    idea = "Measures mean, spread and dead share of one layer's activations."
    source = "dead share: Sokar et al. 2023, arXiv 2302.12902"
    when = "A layer looks unhealthy, and more should be measured before it is changed."

    def supports(self, layer: LayerInfo) -> str:
        return "" if layer.graftable else layer.reason

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {"every": 10}

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        return (self.default_config(layer),)

    def check_config(self, config: dict[str, Any]) -> None:
        check_integer(config, "every", low=1, high=1_000_000)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return 0

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return 4 * math.prod(layer.out_shape) // int(config["every"])

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return ActivationStatistics(every=config["every"], channel_axis=layer.channel_axis)
