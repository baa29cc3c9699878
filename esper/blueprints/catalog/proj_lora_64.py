"""BP-PROJ-LoRA-64: a low-rank update beside a weight matrix.

Shape legend: N rows, I channels in, O channels out, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints import layout
from esper.blueprints.base import Blueprint, Graft, check_integer, check_number, scaled_sizes
from esper.blueprints.initial import Initializer
from esper.blueprints.pointwise import project
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, LayerInfo, Risk

MAX_RANK = 64
DEFAULT_ALPHA = 16.0
_CONVOLVE: dict[str, Callable[..., Tensor]] = {
    "Conv1d": F.conv1d,
    "Conv2d": F.conv2d,
    "Conv3d": F.conv3d,
}


class LowRank(Graft):
    """``y + α/√R · up(down(x))``; ``up`` starts at zero, and its first gradient is not zero."""

    def __init__(self, down: nn.Parameter, up: nn.Parameter, *, alpha: float) -> None:
        super().__init__()
        self.down = down  # [R, I], or [R, I, *kernel] beside a convolution
        self.up = up  # [O, R]
        # √R and not R: changing the rank keeps the size of the update (rsLoRA, arXiv 2312.03732).
        self.scaling = self.amplification = alpha / math.sqrt(up.shape[1])

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        h_NR = F.linear(layout.as_weight_dtype(x, self.down), self.down)
        return y + (self.scaling * F.linear(h_NR, self.up)).to(y.dtype)

    def update(self) -> Tensor:
        """The update of the host's weight, in the host's layout [O, I, …]."""
        change = self.up @ self.down.flatten(1)
        return self.scaling * change.reshape(self.up.shape[0], *self.down.shape[1:])

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        weight = host._parameters.get("weight")  # not getattr: a parametrised weight is computed
        update = self.update()
        if type(host).__name__ in layout.TRANSPOSED_LINEAR:
            update = update.T
        if weight is None or weight.shape != update.shape:
            super().merge(host)
        else:
            weight.add_(update)


class LowRankConvolution(LowRank):
    """The same beside a convolution: a kernel of the same size with R channels, then 1×1."""

    def __init__(
        self, down: nn.Parameter, up: nn.Parameter, *, alpha: float, layer: LayerInfo
    ) -> None:
        super().__init__(down, up, alpha=alpha)
        self.convolution = layer.kind
        self.geometry = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        convolve = _CONVOLVE[self.convolution]
        h = convolve(layout.as_weight_dtype(x, self.down), self.down, **self.geometry)
        return y + (self.scaling * project(h, self.up, channel_axis=1)).to(y.dtype)


class ProjLora64(Blueprint):
    slug = "proj_lora_64"
    id = "BP-PROJ-LoRA-64"
    title = "Low-rank update (LoRA)"
    category = BlueprintCategory.EFFICIENCY
    kind = GraftKind.PARALLEL
    adaptation_type = AdaptationType.ADD_EFFICIENCY
    risk = Risk.LOW
    mergeable = True
    tunes = ("rank", "alpha")
    idea = "Adds a trainable low-rank matrix beside the layer's weight."
    source = "Hu et al. 2021, arXiv 2106.09685; scaling α/√r: Kalajdzievski 2023, arXiv 2312.03732"
    when = "The layer's weight hardly moves, or is frozen, and a small correction may be enough."
    conflicts: ClassVar[frozenset[str]] = frozenset()

    def supports(self, layer: LayerInfo) -> str:
        reason = layout.why_not_parallel(layer)
        if reason:
            return reason
        if not (layout.is_linear(layer) or layout.is_convolution(layer)):
            return (
                f"its kind, {layer.kind}, has no weight matrix that a low-rank update could add to"
            )
        if layer.groups != 1:
            return (
                f"its weight is split in {layer.groups} groups, and a low-rank update has no groups"
            )
        if self._largest_rank(layer) < 1:
            return "it has fewer than 4 channels, so a low-rank update would not be smaller"
        return ""

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {"rank": self._largest_rank(layer), "alpha": DEFAULT_ALPHA}

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        ranks = scaled_sizes(self._largest_rank(layer), smallest=1)
        return tuple({"rank": rank, "alpha": DEFAULT_ALPHA} for rank in ranks)

    def check_config(self, config: dict[str, Any]) -> None:
        check_integer(config, "rank", low=1, high=MAX_RANK)
        check_number(config, "alpha", low=0.0, high=1024.0)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        window = math.prod(layer.kernel_size)
        return int(config["rank"]) * (layer.features_in * window + layer.features_out)

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return 2 * self._rows(layer) * self.parameters(layer, config)

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return self._rows(layer) * int(config["rank"]) * layout.dtype_bytes(layer)

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        rank, alpha = config["rank"], config["alpha"]
        down = weights.uniform(rank, layer.features_in, *layer.kernel_size)
        up = weights.zeros(layer.features_out, rank)
        if layout.is_convolution(layer):
            return LowRankConvolution(down, up, alpha=alpha, layer=layer)
        return LowRank(down, up, alpha=alpha)

    @staticmethod
    def _largest_rank(layer: LayerInfo) -> int:
        return min(MAX_RANK, min(layer.features_in, layer.features_out) // 4)

    @staticmethod
    def _rows(layer: LayerInfo) -> int:
        return layout.position_count(layer, of_output=True)
