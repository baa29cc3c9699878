"""BP-MLP-GELU-2048: a GELU feed-forward branch beside the layer.

Shape legend: N rows, I channels in, H hidden, O channels out.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints import layout
from esper.blueprints.base import Blueprint, Graft, check_integer, scaled_sizes
from esper.blueprints.initial import Initializer
from esper.blueprints.pointwise import project, why_not_aligned
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, LayerInfo, Risk

HIDDEN_AT_WIDTH = (2048, 768)  # the original's size, and the width that it was made for
MAX_HIDDEN = 65_536


class GeluBranch(Graft):
    """``y + W_out · gelu(W_in x + b)``; W_out is zero at birth and has no bias."""

    def __init__(
        self,
        weight_in: nn.Parameter,
        bias_in: nn.Parameter,
        weight_out: nn.Parameter,
        *,
        channel_axis: int,
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.weight_in = weight_in  # [H, I]
        self.bias_in = bias_in  # [H]
        self.weight_out = weight_out  # [O, H]
        self.channel_axis = channel_axis
        self.stride = stride

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = project(
            layout.as_weight_dtype(x, self.weight_in),
            self.weight_in,
            self.bias_in,
            channel_axis=self.channel_axis,
            stride=self.stride,
        )
        change = project(F.gelu(hidden), self.weight_out, channel_axis=self.channel_axis)
        return y + change.to(y.dtype)


class MlpGelu2048(Blueprint):
    slug = "mlp_gelu_2048"
    id = "BP-MLP-GELU-2048"
    title = "Feed-forward branch (GELU)"
    category = BlueprintCategory.TRANSFORMER
    kind = GraftKind.PARALLEL
    adaptation_type = AdaptationType.ADD_FFN
    risk = Risk.MEDIUM
    idea = "Adds a two-layer GELU network beside the layer, 2048/768 times as wide."
    source = "Vaswani et al. 2017, arXiv 1706.03762; GELU: arXiv 1606.08415"
    when = "The layer is too small for its job: loss has flattened and gradients still agree."
    conflicts: ClassVar[frozenset[str]] = frozenset({"mlp_swiglu_4096"})

    def supports(self, layer: LayerInfo) -> str:
        return why_not_aligned(layer)

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {"hidden": self._full_hidden(layer)}

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        hiddens = scaled_sizes(self._full_hidden(layer), smallest=1)
        return tuple({"hidden": hidden} for hidden in hiddens)

    def check_config(self, config: dict[str, Any]) -> None:
        check_integer(config, "hidden", low=1, high=MAX_HIDDEN)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return int(config["hidden"]) * (layer.features_in + 1 + layer.features_out)

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        rows = layout.position_count(layer, of_output=True)
        return 2 * rows * int(config["hidden"]) * (layer.features_in + layer.features_out)

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        rows = layout.position_count(layer, of_output=True)
        return 2 * rows * int(config["hidden"]) * layout.dtype_bytes(layer)  # before, after GELU

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        hidden = config["hidden"]
        return GeluBranch(
            weights.uniform(hidden, layer.features_in),
            weights.zeros(hidden),
            weights.zeros(layer.features_out, hidden),
            channel_axis=layer.channel_axis,
            stride=layer.stride,
        )

    @staticmethod
    def _full_hidden(layer: LayerInfo) -> int:
        wide, width = HIDDEN_AT_WIDTH
        return min(MAX_HIDDEN, max(1, round(layer.features_in * wide / width)))
