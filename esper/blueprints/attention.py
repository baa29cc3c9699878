"""Self-attention beside a layer; a blueprint chooses the number of key and value heads.

Shape legend: B batch, T time, I channels in, W width of all query heads, V width of all value
heads (and of all key heads), O channels out, H query heads, G key (and value) heads.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
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
    """``y + W_out · attention(norm(x))``; W_out starts at zero."""

    def __init__(
        self,
        norm: tuple[nn.Parameter, nn.Parameter],
        weight_qkv: nn.Parameter,
        weight_out: nn.Parameter,
        *,
        heads: int,
        key_heads: int,
        causal: bool,
        sequence_axis: int,
    ) -> None:
        super().__init__()
        self.norm_gain, self.norm_bias = norm  # [I]
        self.weight_qkv = weight_qkv  # [W + 2 V, I]
        self.weight_out = weight_out  # [O, W]
        self.heads = heads
        self.key_heads = key_heads
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
        counts = [self.heads, self.key_heads, self.key_heads]
        heads = qkv.reshape(*x_BTI.shape[:2], sum(counts), -1).transpose(1, 2)
        q_BHT, k_BGT, v_BGT = torch.split(heads, counts, dim=1)  # each [B, heads, T, W / H]
        shared = self.key_heads != self.heads
        mixed = F.scaled_dot_product_attention(
            q_BHT, k_BGT, v_BGT, is_causal=self.causal, enable_gqa=shared
        )
        return F.linear(mixed.transpose(1, 2).flatten(-2), self.weight_out)


class SelfAttention(Blueprint):
    """Base of the blueprints of a self-attention branch.

    Attributes:
        queries_per_key: query heads that share one key head and one value head.
    """

    queries_per_key: ClassVar[int] = 1
    spans = True
    category = BlueprintCategory.TRANSFORMER
    kind = GraftKind.PARALLEL
    adaptation_type = AdaptationType.ADD_ATTENTION
    risk = Risk.MEDIUM

    def supports(self, layer: LayerInfo) -> str:
        reason = layout.why_not_parallel(layer)
        if reason:
            return reason
        if layer.kind in layout.ATTENTION:
            return "it is attention itself; graft attention into a layer before or after it"
        if layer.kind in layout.RECURRENT:
            return "the time axis of a recurrent layer is unknown"
        if layer.features_in < 2:
            return "it has one input channel, and normalising one channel gives zero"
        if not layer.has_sequence:
            return f"its input {list(layer.in_shape)} has no sequence axis to attend over"
        if layer.sequence_axis < 0:
            return (
                "some parts of its model take time first and others the batch, and its input "
                f"{list(layer.in_shape)} does not show which axis is time"
            )
        if layer.features_in < self.queries_per_key:
            return f"it has fewer than {self.queries_per_key} channels, and each head needs one"
        return ""

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return self._config(layer, self._full_width(layer))

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        widths = scaled_sizes(self._full_width(layer), smallest=self.queries_per_key, count=3)
        configs = [self._config(layer, width) for width in widths]
        return tuple({config["width"]: config for config in configs}.values())

    def check_config(self, config: dict[str, Any]) -> None:
        check_integer(config, "width", low=1, high=MAX_WIDTH)
        check_integer(config, "heads", low=1, high=config["width"])
        check_integer(config, "sequence_axis", low=0, high=1)
        if config["width"] % config["heads"]:
            raise ConfigurationError(
                f"width {config['width']} is not divisible by {config['heads']} heads"
            )
        if config["heads"] % self.queries_per_key:
            raise ConfigurationError(
                f"heads must be a multiple of {self.queries_per_key}, got {config['heads']}"
            )
        if not isinstance(config["causal"], bool):
            raise ConfigurationError(f"causal must be true or false, got {config['causal']!r}")

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        d_in, d_out, width = layer.features_in, layer.features_out, int(config["width"])
        return 2 * d_in + self._projected(width) * d_in + d_out * width

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        width, rows = int(config["width"]), layout.position_count(layer)
        weights = self._projected(width) * layer.features_in + layer.features_out * width
        mixing = 4 * rows * self._length(layer, config) * width
        return 2 * rows * weights + mixing

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        # Kept: normed x, q, k, v and the mixed values; two statistics a row for the norm and one
        # a row and head for the softmax, in float32.
        rows, width = layout.position_count(layer), int(config["width"])
        channels = layer.features_in + self._projected(width) + width
        values = rows * channels * layout.dtype_bytes(layer)
        return values + rows * (2 + int(config["heads"])) * 4

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        d_in, width = layer.features_in, config["width"]
        return AttentionBranch(
            (weights.ones(d_in), weights.zeros(d_in)),
            weights.uniform(self._projected(width), d_in),
            weights.zeros(layer.features_out, width),
            heads=config["heads"],
            key_heads=config["heads"] // self.queries_per_key,
            causal=config["causal"],
            sequence_axis=config["sequence_axis"],
        )

    def _projected(self, width: int) -> int:
        """Width of q, k and v together."""
        return width + 2 * (width // self.queries_per_key)

    def _config(self, layer: LayerInfo, width: int) -> dict[str, Any]:
        share = self.queries_per_key
        heads = max(share, width // HEAD_WIDTH // share * share)
        # causal if nothing else is known: in a language model, a branch that sees future tokens
        # lowers the loss without learning; an encoder loses only little by a causal branch.
        return {
            "width": width // heads * heads,
            "heads": heads,
            "causal": not layer.looks_ahead,
            "sequence_axis": layer.sequence_axis,
        }

    @staticmethod
    def _full_width(layer: LayerInfo) -> int:
        return min(MAX_WIDTH, layer.features_in)

    @staticmethod
    def _length(layer: LayerInfo, config: dict[str, Any]) -> int:
        return layer.in_shape[int(config["sequence_axis"])]
