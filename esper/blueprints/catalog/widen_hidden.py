"""BP-WIDEN-HIDDEN: more units in the hidden layer between two layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from esper.blueprints import layout
from esper.blueprints.activations import ACTIVATIONS
from esper.blueprints.base import Blueprint, Graft, check_integer
from esper.blueprints.initial import Initializer
from esper.blueprints.pointwise import project, why_not_aligned
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, LayerInfo, Risk
from esper.exceptions import ConfigurationError

MAX_HIDDEN = 65_536
DEFAULT_ACTIVATION = "gelu"
WIDE_ENOUGH = 32  # small models are often wider than their inputs and outputs


class WideBranch(Graft):
    """``y + W_out · a(W_in x + b)``; W_out starts at zero and has no bias."""

    def __init__(
        self,
        weight_in: nn.Parameter,
        bias_in: nn.Parameter,
        weight_out: nn.Parameter,
        *,
        activation: str,
        channel_axis: int,
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.weight_in = weight_in  # [H, I]
        self.bias_in = bias_in  # [H]
        self.weight_out = weight_out  # [O, H]
        self.activation = activation
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
        hidden = ACTIVATIONS[self.activation](hidden)
        change = project(hidden, self.weight_out, channel_axis=self.channel_axis)
        return y + change.to(y.dtype)


class WidenHidden(Blueprint):
    slug = "widen_hidden"
    id = "BP-WIDEN-HIDDEN"
    title = "Wider hidden layer"
    category = BlueprintCategory.TRANSFORMER
    kind = GraftKind.PARALLEL
    adaptation_type = AdaptationType.ADD_FFN
    risk = Risk.LOW
    mergeable = True
    spans = True
    tunes = ("hidden",)
    idea = "Adds units to the hidden layer between two layers, from one unit up."
    source = "Evci et al. 2022 (GradMax), arXiv 2201.05125; Verbockhaven et al. 2024, TINY"
    when = "The hidden layer is the bottleneck: the training loss is flat, and so is the held-out."

    def supports(self, layer: LayerInfo) -> str:
        if not layer.since:
            return "a hidden layer lies between two layers; name the first one with since="
        return why_not_aligned(layer)

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {
            "hidden": self._wide_enough(layer),
            "activation": layer.activation or DEFAULT_ACTIVATION,
        }

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        largest, default = self._wide_enough(layer), self.default_config(layer)
        hiddens = {min(largest, 1 << power) for power in range(largest.bit_length() + 1)}
        return tuple({**default, "hidden": hidden} for hidden in sorted(hiddens))

    def check_config(self, config: dict[str, Any]) -> None:
        check_integer(config, "hidden", low=1, high=MAX_HIDDEN)
        if config["activation"] not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigurationError(
                f"activation must be one of {known}, got {config['activation']!r}"
            )

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return int(config["hidden"]) * (layer.features_in + layer.features_out + 1)

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        rows = layout.position_count(layer, of_output=True)
        products = layer.features_in + layer.features_out
        return 2 * rows * int(config["hidden"]) * products

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        rows = layout.position_count(layer, of_output=True)
        return 2 * rows * int(config["hidden"]) * layout.dtype_bytes(layer)

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        hidden = config["hidden"]
        return WideBranch(
            weights.uniform(hidden, layer.features_in),
            weights.uniform(hidden, fan_in=layer.features_in),
            weights.zeros(layer.features_out, hidden),
            activation=config["activation"],
            channel_axis=layer.channel_axis,
            stride=layer.stride,
        )

    def _wide_enough(self, layer: LayerInfo) -> int:
        widest = max(layer.features_in, layer.features_out, WIDE_ENOUGH)
        return min(MAX_HIDDEN, widest)
