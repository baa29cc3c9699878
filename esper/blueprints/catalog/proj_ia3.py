"""BP-PROJ-IA3: one learned gain per output channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import layout
from esper.blueprints.base import Blueprint, Graft
from esper.blueprints.initial import Initializer
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, LayerInfo, Risk


class ChannelGain(Graft):
    """``y · gain``; the gain starts at one, and multiplying by one is exact."""

    def __init__(self, gain: nn.Parameter, *, channel_axis: int) -> None:
        super().__init__()
        self.gain = gain  # [C]
        self.channel_axis = channel_axis

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return y * layout.per_channel(self.gain, y, self.channel_axis).to(y.dtype)

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        weight = host._parameters.get("weight")
        kind = type(host).__name__
        # Channels are the last axis of a table or a transposed matrix, the first of all others.
        last = kind in layout.TRANSPOSED_LINEAR or kind in layout.EMBEDDING
        norm = layout.is_norm_kind(kind)
        plain = kind in layout.LINEAR | layout.CONVOLUTION or last or norm
        axis = -1 if last else 0
        if (
            weight is None
            or not plain
            or weight.shape[axis] != self.gain.numel()
            or (norm and not _scales_by_its_weight(host))
        ):
            super().merge(host)
            return
        shape = (-1,) if last else (-1, *([1] * (weight.dim() - 1)))
        weight.mul_(self.gain.reshape(shape))
        bias = host._parameters.get("bias")
        if bias is not None:
            bias.mul_(self.gain)


def _scales_by_its_weight(norm: nn.Module) -> bool:
    """Doubling weight and bias doubles its output, unlike in Gemma's norm, which scales by 1 + w.

    torch's own all do.
    """
    if type(norm).__module__.startswith("torch."):
        return True
    named = (norm._parameters.get(name) for name in ("weight", "bias"))
    tensors = [tensor for tensor in named if tensor is not None]
    kept = [tensor.clone() for tensor in tensors]
    width = len(kept[0])
    probe = torch.linspace(-1, 1, 4 * width, dtype=kept[0].dtype, device=kept[0].device)
    before = norm(probe.reshape(4, width))
    for tensor in tensors:
        tensor.mul_(2)
    after = norm(probe.reshape(4, width))
    for tensor, old in zip(tensors, kept, strict=True):
        tensor.copy_(old)
    return torch.allclose(after, 2 * before, rtol=1e-2, atol=1e-4)


class ProjIa3(Blueprint):
    slug = "proj_ia3"
    id = "BP-PROJ-IA3"
    title = "Channel gain (IA³)"
    category = BlueprintCategory.EFFICIENCY
    kind = GraftKind.SCALE
    adaptation_type = AdaptationType.ADD_EFFICIENCY
    risk = Risk.LOW
    mergeable = True
    idea = "Multiplies each output channel by a learned gain that starts at one."
    source = "Liu et al. 2022, arXiv 2205.05638"
    when = "Channels carry very different weight, and almost no parameters may be added."

    def supports(self, layer: LayerInfo) -> str:
        if not layer.graftable:
            return layer.reason
        if not layout.is_understood(layer):
            return f"the channel axis of a {layer.kind} is unknown"
        if not layer.features_out:
            return "its channels are unknown, because it did not run in the traced forward pass"
        return ""

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {}

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        return ({},)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return layer.features_out

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return layout.position_count(layer, of_output=True) * layer.features_out

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        # The product keeps y, which nothing else may need.
        rows = layout.position_count(layer, of_output=True)
        return rows * layer.features_out * layout.dtype_bytes(layer)

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return ChannelGain(weights.ones(layer.features_out), channel_axis=layer.channel_axis)
