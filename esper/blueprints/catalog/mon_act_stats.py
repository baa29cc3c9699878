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

    def __init__(
        self, *, every: int, channel_axis: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.every = every
        self.channel_axis = channel_axis
        # Tensors, so that compiled code sees no new number; not buffers: a measurement belongs
        # neither to the model's state nor to its digest. The counter is read by the host.
        self.calls = torch.zeros((), dtype=torch.long, device="cpu")
        self.latest = torch.full((len(_MEASURED),), math.nan, dtype=torch.float32, device=device)

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        take = take_now_and_then if torch.compiler.is_compiling() else _take_now_and_then
        take(y.detach(), self.latest, self.calls, self.every, self.channel_axis)
        return y

    def signals(self) -> dict[str, float]:
        return dict(zip(map(str, _MEASURED), self.latest.tolist(), strict=True))

    @torch.no_grad()
    def forget(self) -> None:
        self.calls.zero_()
        self.latest.fill_(math.nan)


def _take_now_and_then(
    y: Tensor, latest: Tensor, calls: Tensor, every: int, channel_axis: int
) -> None:
    """Every ``every`` calls, writes the statistics of ``y`` to ``latest``."""
    with torch.no_grad():
        if int(calls) % every == 0:
            latest.copy_(_statistics(y, channel_axis))
        calls.add_(1)


# One operator for the compiler: what is measured only now and then stays out of its graph.
take_now_and_then = torch.library.custom_op(
    "esper::take_activation_statistics", _take_now_and_then, mutates_args=("latest", "calls")
)


def _statistics(y: Tensor, channel_axis: int) -> Tensor:
    h = y.float()
    others = [axis for axis in range(h.dim()) if axis != channel_axis % h.dim()]
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
        return ActivationStatistics(
            every=config["every"], channel_axis=layer.channel_axis, device=weights.device
        )
