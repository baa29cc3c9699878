"""BP-LN-RMS: an RMSNorm gradually replaces a LayerNorm.

Shape legend: N all axes but the channels, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints import layout
from esper.blueprints.base import Blueprint, Graft, check_integer, check_number
from esper.blueprints.initial import Initializer
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, LayerInfo, Risk

# No longer than a run's maturity_steps: the verdict then compares the finished replacement.
DEFAULT_RAMP_STEPS = 50
MAX_RAMP_STEPS = 10_000
DEFAULT_EPS = 1e-5
FLOAT32_BYTES = 4


class RmsReplacement(Graft):
    """``(1 - α) y + α · gain · x / rms(x)``; α starts at zero and grows to one.

    Computed in float32 at least, as a norm under autocast.
    """

    alpha: Tensor

    def __init__(self, gain: nn.Parameter, *, ramp_steps: int, eps: float) -> None:
        super().__init__()
        self.gain = gain  # [C]
        self.alpha = torch.zeros((), dtype=torch.float32, device=gain.device)
        self.ramp_steps = ramp_steps
        self.eps = eps

    @torch.no_grad()
    def inherit(self, host: nn.Module) -> None:
        if not isinstance(host, nn.LayerNorm) or host.normalized_shape != tuple(self.gain.shape):
            raise TypeError("it is not torch's LayerNorm over the last axis alone")
        self.gain.copy_(host.weight)

    @torch.no_grad()
    def on_step(self) -> None:
        # In place and on the device: no synchronisation, and compiled code sees no new number.
        self.alpha.add_(1.0 / self.ramp_steps).clamp_(max=1.0)

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        normed_NC = F.rms_norm(x.to(wide), self.gain.shape, self.gain.to(wide), self.eps)
        # lerp is exact at both ends: y at 0, the replacement at 1.
        return torch.lerp(y.to(wide), normed_NC, self.alpha.to(wide)).to(y.dtype)


class LnRms(Blueprint):
    slug = "ln_rms"
    id = "BP-LN-RMS"
    title = "LayerNorm becomes RMSNorm"
    category = BlueprintCategory.TRANSFORMER
    kind = GraftKind.REPLACE
    adaptation_type = AdaptationType.ADD_EFFICIENCY
    risk = Risk.HIGH
    idea = "Fades a LayerNorm out and an RMSNorm with its gain in, over a number of steps."
    source = "Zhang and Sennrich 2019, arXiv 1910.07467"
    when = (
        "The model should end with RMSNorm, which needs no mean and no bias; both run in between."
    )

    def supports(self, layer: LayerInfo) -> str:
        if not layer.graftable:
            return layer.reason
        if layer.kind != "LayerNorm":
            return f"its kind is {layer.kind}, and only a LayerNorm can become an RMSNorm"
        width = layer.features_out
        if not width or layer.features_in != width:
            return "its channels are unknown, because it did not run in the traced forward pass"
        if layer.parameters not in (width, 2 * width):
            return "it normalises over more than its last axis, and this RMSNorm over the last only"
        return "" if width > 1 else "it has one channel, and the RMSNorm of one channel is its sign"

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {"ramp_steps": DEFAULT_RAMP_STEPS, "eps": DEFAULT_EPS}

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        return (self.default_config(layer),)

    def check_config(self, config: dict[str, Any]) -> None:
        check_integer(config, "ramp_steps", low=1, high=MAX_RAMP_STEPS)
        check_number(config, "eps", low=0.0, high=1.0)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return layer.features_out

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        # Four operations per value to normalise it, three to mix it with the host's.
        return 7 * layout.position_count(layer) * layer.features_out

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        # Kept: the normed values and one statistic a row, in float32 at least; where the layer is
        # narrower, also the wide copies of x and of the gain.
        rows, width = layout.position_count(layer), layer.features_out
        narrow = layout.dtype_bytes(layer)
        copied = (rows + 1) * width if narrow < FLOAT32_BYTES else 0
        return (rows * (width + 1) + copied) * max(narrow, FLOAT32_BYTES)

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return RmsReplacement(
            weights.ones(layer.features_out), ramp_steps=config["ramp_steps"], eps=config["eps"]
        )
