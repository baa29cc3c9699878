"""BP-ATTN-STD: a pre-norm multi-head self-attention branch beside the layer.

Shape legend: B batch, T time, I channels in, W width of all heads, O channels out, h heads.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints import layout
from esper.blueprints.base import Blueprint, Graft, check_integer, scaled_sizes
from esper.blueprints.initial import Initializer
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, LayerInfo, Risk
from esper.exceptions import ConfigurationError

HEAD_WIDTH = 64
MAX_WIDTH = 16_384


class AttentionBranch(Graft):
    """``y + W_out · attention(norm(x))``; W_out is zero at birth."""

    def __init__(
        self,
        norm: tuple[nn.Parameter, nn.Parameter],
        weight_qkv: nn.Parameter,
        weight_out: nn.Parameter,
        *,
        heads: int,
        causal: bool,
        sequence_axis: int,
    ) -> None:
        super().__init__()
        self.norm_gain, self.norm_bias = norm  # [I]
        self.weight_qkv = weight_qkv  # [3 W, I]
        self.weight_out = weight_out  # [O, W]
        self.heads = heads
        self.causal = causal
        self.sequence_axis = sequence_axis

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        x_BTI = x.transpose(0, 1) if self.sequence_axis == 0 else x
        change_BTO = self._attend(layout.as_weight_dtype(x_BTI, self.weight_qkv)).to(y.dtype)
        return y + (change_BTO.transpose(0, 1) if self.sequence_axis == 0 else change_BTO)

    def _attend(self, x_BTI: Tensor) -> Tensor:
        gain, bias = self.norm_gain, self.norm_bias
        normed = F.layer_norm(x_BTI, gain.shape, gain, bias)
        qkv = F.linear(normed, self.weight_qkv)
        heads = qkv.reshape(*x_BTI.shape[:2], 3, self.heads, -1)
        q_BhT, k_BhT, v_BhT = heads.permute(2, 0, 3, 1, 4)  # each [B, h, T, W / h]
        mixed = F.scaled_dot_product_attention(q_BhT, k_BhT, v_BhT, is_causal=self.causal)
        return F.linear(mixed.transpose(1, 2).flatten(-2), self.weight_out)


class AttnStd(Blueprint):
    slug = "attn_std"
    id = "BP-ATTN-STD"
    title = "Self-attention branch"
    category = BlueprintCategory.TRANSFORMER
    kind = GraftKind.PARALLEL
    adaptation_type = AdaptationType.ADD_ATTENTION
    risk = Risk.MEDIUM
    idea = "Adds multi-head self-attention beside the layer, so that positions can exchange facts."
    source = "Vaswani et al. 2017, arXiv 1706.03762; pre-norm: Xiong et al. 2020, arXiv 2002.04745"
    when = "Sequence model whose layers mix too little over time. Masks of the host are not seen."
    conflicts: ClassVar[frozenset[str]] = frozenset({"attn_split_qk"})

    def supports(self, layer: LayerInfo) -> str:
        reason = layout.why_not_parallel(layer)
        if reason:
            return reason
        if layer.kind in layout.ATTENTION:
            return "it is attention already"
        if layer.kind in layout.RECURRENT:
            return "a recurrent layer does not tell which of its axes is time"
        if layer.features_in < 2:
            return "it has one input channel, and a norm over one channel is always zero"
        if not layer.has_sequence:
            return f"its input {list(layer.in_shape)} has no sequence axis to attend over"
        return ""

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return self._config(self._full_width(layer))

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        widths = scaled_sizes(self._full_width(layer), smallest=1, count=3)
        return tuple(self._config(width) for width in widths)

    def check_config(self, config: dict[str, Any]) -> None:
        check_integer(config, "width", low=1, high=MAX_WIDTH)
        check_integer(config, "heads", low=1, high=config["width"])
        check_integer(config, "sequence_axis", low=0, high=1)
        if config["width"] % config["heads"]:
            raise ConfigurationError(
                f"width {config['width']} does not split into {config['heads']} equal heads"
            )
        if not isinstance(config["causal"], bool):
            raise ConfigurationError(f"causal must be true or false, got {config['causal']!r}")

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        d_in, d_out, width = layer.features_in, layer.features_out, int(config["width"])
        return 2 * d_in + 3 * width * d_in + d_out * width

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        width, rows = int(config["width"]), layout.position_count(layer)
        projections = 2 * rows * (3 * width * layer.features_in + layer.features_out * width)
        mixing = 4 * rows * self._length(layer, config) * width
        return projections + mixing

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        # Kept: normed x, q, k, v and the mixed values; two statistics a row for the norm and one
        # a row and head for the softmax, in float32.
        rows, width = layout.position_count(layer), int(config["width"])
        values = rows * (layer.features_in + 4 * width) * layout.dtype_bytes(layer)
        return values + rows * (2 + int(config["heads"])) * 4

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        d_in, width = layer.features_in, config["width"]
        return AttentionBranch(
            (weights.ones(d_in), weights.zeros(d_in)),
            weights.uniform(3 * width, d_in),
            weights.zeros(layer.features_out, width),
            heads=config["heads"],
            causal=config["causal"],
            sequence_axis=config["sequence_axis"],
        )

    @staticmethod
    def _config(width: int) -> dict[str, Any]:
        heads = max(1, width // HEAD_WIDTH)
        # causal by default: in a language model, a branch that sees the future lets the loss fall
        # to nothing by cheating, and an encoder only loses a little by not looking ahead.
        return {
            "width": width // heads * heads,
            "heads": heads,
            "causal": True,
            "sequence_axis": 1,
        }

    @staticmethod
    def _full_width(layer: LayerInfo) -> int:
        return min(MAX_WIDTH, layer.features_in)

    @staticmethod
    def _length(layer: LayerInfo, config: dict[str, Any]) -> int:
        return layer.in_shape[int(config["sequence_axis"])]
