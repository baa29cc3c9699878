"""Point-wise networks with one hidden layer, beside a layer: the base of four blueprints.

Shape legend: N rows, I channels in, H hidden, O channels out.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints import layout
from esper.blueprints.base import Blueprint, Graft, check_integer, scaled_sizes
from esper.blueprints.initial import Initializer
from esper.blueprints.pointwise import project, why_not_aligned
from esper.contracts import GraftKind, LayerInfo, Risk

MAX_HIDDEN = 65_536


class GeluBranch(Graft):
    """``y + W_out · gelu(W_in x + b)``; W_out starts at zero and has no bias."""

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

    @property
    def activation(self) -> str:
        """Of its hidden units, by its name in ``esper.blueprints.activations``."""
        return "gelu"

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(x).to(y.dtype)

    def change(self, x: Tensor) -> Tensor:
        """What is added to the layer's output."""
        hidden = project(
            layout.as_weight_dtype(x, self.weight_in),
            self.weight_in,
            self.bias_in,
            channel_axis=self.channel_axis,
            stride=self.stride,
        )
        return project(F.gelu(hidden), self.weight_out, channel_axis=self.channel_axis)


class SwigluBranch(Graft):
    """``y + W_out · (silu(W_gate x) · W_up x)``; W_out starts at zero; there are no biases."""

    def __init__(
        self,
        weight_gate: nn.Parameter,
        weight_up: nn.Parameter,
        weight_out: nn.Parameter,
        *,
        channel_axis: int,
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.weight_gate = weight_gate  # [H, I]
        self.weight_up = weight_up  # [H, I]
        self.weight_out = weight_out  # [O, H]
        self.channel_axis = channel_axis
        self.stride = stride

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(x).to(y.dtype)

    def change(self, x: Tensor) -> Tensor:
        """What is added to the layer's output."""
        hidden = F.silu(self._enter(x, self.weight_gate)) * self._enter(x, self.weight_up)
        return project(hidden, self.weight_out, channel_axis=self.channel_axis)

    def _enter(self, x: Tensor, weight: Tensor) -> Tensor:
        x = layout.as_weight_dtype(x, weight)
        return project(x, weight, channel_axis=self.channel_axis, stride=self.stride)


class FeedForward(Blueprint):
    """A branch with one hidden layer, in the proportions of its original.

    Attributes:
        hidden_at_width: hidden size and model width of the original.
    """

    hidden_at_width: ClassVar[tuple[int, int]]
    spans = True
    tunes = ("hidden",)
    kind = GraftKind.PARALLEL
    risk = Risk.MEDIUM

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
        return int(config["hidden"]) * self._weights_per_unit(layer)

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        rows = layout.position_count(layer, of_output=True)
        return 2 * rows * int(config["hidden"]) * self._products_per_unit(layer)

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        rows = layout.position_count(layer, of_output=True)
        kept = self._kept_per_unit()
        return kept * rows * int(config["hidden"]) * layout.dtype_bytes(layer)

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return self.make_branch(layer, config, weights)

    @abstractmethod
    def make_branch(
        self, layer: LayerInfo, config: dict[str, Any], weights: Initializer
    ) -> GeluBranch | SwigluBranch:
        """The branch of this size; it changes nothing yet."""

    @abstractmethod
    def _weights_per_unit(self, layer: LayerInfo) -> int:
        """Parameters of one hidden unit, biases included."""

    @abstractmethod
    def _products_per_unit(self, layer: LayerInfo) -> int:
        """Multiply-adds of one hidden unit at one position."""

    @abstractmethod
    def _kept_per_unit(self) -> int:
        """Values of one hidden unit at one position that the backward pass needs."""

    def _full_hidden(self, layer: LayerInfo) -> int:
        hidden, width = self.hidden_at_width
        return min(MAX_HIDDEN, max(1, round(layer.features_in * hidden / width)))


class GeluFeedForward(FeedForward):
    """Builds a :class:`GeluBranch`."""

    def make_branch(
        self, layer: LayerInfo, config: dict[str, Any], weights: Initializer
    ) -> GeluBranch:
        hidden = config["hidden"]
        return GeluBranch(
            weights.uniform(hidden, layer.features_in),
            weights.zeros(hidden),
            weights.zeros(layer.features_out, hidden),
            channel_axis=layer.channel_axis,
            stride=layer.stride,
        )

    def _weights_per_unit(self, layer: LayerInfo) -> int:
        return self._products_per_unit(layer) + 1

    def _products_per_unit(self, layer: LayerInfo) -> int:
        return layer.features_in + layer.features_out

    def _kept_per_unit(self) -> int:
        return 2  # before and after GELU


class SwigluFeedForward(FeedForward):
    """Builds a :class:`SwigluBranch`."""

    def make_branch(
        self, layer: LayerInfo, config: dict[str, Any], weights: Initializer
    ) -> SwigluBranch:
        hidden = config["hidden"]
        return SwigluBranch(
            weights.uniform(hidden, layer.features_in),
            weights.uniform(hidden, layer.features_in),
            weights.zeros(layer.features_out, hidden),
            channel_axis=layer.channel_axis,
            stride=layer.stride,
        )

    def _weights_per_unit(self, layer: LayerInfo) -> int:
        return self._products_per_unit(layer)

    def _products_per_unit(self, layer: LayerInfo) -> int:
        return 2 * layer.features_in + layer.features_out

    def _kept_per_unit(self) -> int:
        return 4  # gate before and after SiLU, the other half, their product
