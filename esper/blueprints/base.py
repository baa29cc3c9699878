"""What a blueprint is, and what it builds.

A blueprint is a module template. It answers for a layer it has never touched (fits or not, why,
at which sizes, at what cost) and builds a :class:`Graft` for it. It is stateless; one instance
serves all runs.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from esper.blueprints import layout
from esper.blueprints.initial import Initializer
from esper.contracts import (
    AdaptationType,
    BlueprintCategory,
    CostForecast,
    GraftKind,
    LayerInfo,
    Risk,
)
from esper.exceptions import ConfigurationError, IncompatibleLayerError

MIB = 1024 * 1024
# Weight, gradient and the two moments that Adam keeps for it.
COPIES_IN_TRAINING = 4


class Graft(nn.Module, ABC):
    """A living module in a layer's slot.

    Attributes:
        alpha: share of a graft that replaces its host, a tensor buffer; None for all others.
        merged: its effect is in the host's own weights, so it is in no slot.
    """

    alpha: Tensor | None
    merged: bool = False

    def __init__(self) -> None:
        super().__init__()
        # Not a plain class attribute: that would hide a buffer of the same name.
        self.register_buffer("alpha", None)

    @abstractmethod
    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's new output.

        Args:
            x: what went into the layer.
            y: what came out of it, of any batch size, maybe changed by older grafts.

        Returns:
            Same shape, dtype and device as ``y``. Neither ``x`` nor ``y`` is written to.
        """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.combine(x, y)

    def inherit(self, host: nn.Module) -> None:
        """Called once, before the graft is tried and put in; copies what it takes over.

        Raises:
            TypeError: this host has nothing that the graft could start from.
        """

    def on_step(self) -> None:
        """Called after each optimizer step; moves what follows a schedule, such as ``alpha``.

        A session calls it. Without one, the training loop has to. All that it moves are
        buffers, so that an undo or a checkpoint brings the schedule back with the weights.
        """

    def join(self, neighbours: Sequence[Graft]) -> None:
        """Called whenever the grafts of its slot have changed; here they get to know each other.

        Args:
            neighbours: all of them, this one too, oldest first. Keep them in a tuple, which torch
                does not take for children.
        """

    def attach(self, host: nn.Module) -> None:
        """Called before each ``combine`` while gradients are on; ties the graft to its host."""

    def detach(self) -> None:
        """Called when the graft is taken out; undoes ``attach``."""

    def signals(self) -> dict[str, float]:
        """Latest measurements, NaN where there is none yet. Reads the device: not every step."""
        return {}

    def forget(self) -> None:
        """Drops what was measured so far; called after the graft was tried on a sample."""

    def merge(self, host: nn.Module) -> None:
        """Folds the graft into the host's own weights, so that it can be dropped.

        Raises:
            TypeError: this graft, or this host, cannot be merged.
        """
        raise TypeError(f"{type(self).__name__} cannot be merged into a {type(host).__name__}")


def introduce(grafts: Sequence[Graft]) -> None:
    """Tells all grafts of one slot, oldest first, that these are now its grafts."""
    for graft in grafts:
        graft.join(grafts)


class Blueprint(ABC):
    """One entry of the catalogue. One file in ``catalog/`` holds one of these."""

    slug: ClassVar[str]
    id: ClassVar[str]
    title: ClassVar[str]
    category: ClassVar[BlueprintCategory]
    kind: ClassVar[GraftKind]
    adaptation_type: ClassVar[AdaptationType]
    risk: ClassVar[Risk]
    mergeable: ClassVar[bool] = False
    trainable: ClassVar[bool] = True
    parts: ClassVar[int] = 1  # blueprints that it is made of; more than one for a composition
    idea: ClassVar[str]
    source: ClassVar[str]
    when: ClassVar[str]
    conflicts: ClassVar[frozenset[str]] = frozenset()
    # Slugs of which one must sit on the layer before this one may, and as long as it stays.
    requires: ClassVar[frozenset[str]] = frozenset()
    # Why it must not be used while a gradient scaler multiplies gradients; empty: it may.
    scaler_refusal: ClassVar[str] = ""
    # Why it must not be used where the model has replicas on other ranks; empty: it may.
    replicas_refusal: ClassVar[str] = ""
    # Relative difference allowed at birth; 0 for everything beside the host.
    tolerance: ClassVar[float] = 0.0

    @cached_property
    def version(self) -> str:
        """First 16 hex digits of the SHA-256 of the catalogue file and what it derives from."""
        total = hashlib.sha256()
        for cls in type(self).__mro__[: type(self).__mro__.index(Blueprint)]:
            total.update(Path(inspect.getfile(cls)).read_bytes())
        return total.hexdigest()[:16]

    @abstractmethod
    def supports(self, layer: LayerInfo) -> str:
        """Empty when the blueprint fits the layer, else a sentence that says why not."""

    @abstractmethod
    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        """All candidate configurations, smallest first; JSON values only."""

    @abstractmethod
    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        """The configuration that is used when nobody names one."""

    @abstractmethod
    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        """How many parameters the graft will have, exactly."""

    @abstractmethod
    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        """Operations of one forward pass at the seen shape; a multiply-add counts two."""

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        """Bytes that the graft keeps for the backward pass at the seen shape, x and y aside."""
        return 0

    @abstractmethod
    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        """The module itself, for a configuration that is known to be good."""

    def check_config(self, config: dict[str, Any]) -> None:  # noqa: B027 - most take no values
        """Raises ``ConfigurationError`` for values that no layer could take."""

    def config_for(self, layer: LayerInfo, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """The default configuration with ``given`` laid over it, checked.

        Raises:
            ConfigurationError: an unknown key or an absurd value.
            IncompatibleLayerError: the layer does not fit.
        """
        reason = self.supports(layer)
        if reason:
            raise IncompatibleLayerError(layer=layer.name, blueprint=self.slug, reason=reason)
        config = self.default_config(layer)
        unknown = sorted(set(given or {}) - set(config))
        if unknown:
            raise ConfigurationError(
                f"{self.slug} has no setting {', '.join(unknown)}; it has: {', '.join(config)}"
            )
        config.update(given or {})
        self.check_config(config)
        return config

    def forecast(self, layer: LayerInfo, config: dict[str, Any]) -> CostForecast:
        """Cost by arithmetic; nothing is built or measured, so latency is unknown (NaN)."""
        parameters = self.parameters(layer, config)
        held = parameters * layout.dtype_bytes(layer) * COPIES_IN_TRAINING
        activations = self.activation_bytes(layer, config) * max(1, layer.calls)
        return CostForecast(
            parameters=parameters,
            flops=self.flops(layer, config),
            memory_mib=(held + activations) / MIB,
            latency_ms=math.nan,
        )

    def build(
        self,
        layer: LayerInfo,
        config: dict[str, Any] | None = None,
        *,
        seed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Graft:
        """A graft that does not change what the layer computes, made from ``seed`` alone.

        Touches no global random stream, so it may run in a thread beside the training.

        Raises:
            ConfigurationError, IncompatibleLayerError: as :meth:`config_for`.
        """
        full = self.config_for(layer, config)
        weights = Initializer(
            seed,
            device=device or layer.device,
            dtype=dtype or layout.torch_dtype(layer),
        )
        return self.make(layer, full, weights)


def check_integer(config: dict[str, Any], key: str, *, low: int, high: int) -> None:
    """Raises ``ConfigurationError`` unless ``low <= config[key] <= high``."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigurationError(
            f"{key} must be a whole number from {low} to {high}, got {value!r}"
        )


def check_number(config: dict[str, Any], key: str, *, low: float, high: float) -> None:
    """Raises ``ConfigurationError`` unless ``low < config[key] <= high``."""
    value = config[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (math.isfinite(value) and low < value <= high):
        raise ConfigurationError(f"{key} must be above {low} and at most {high}, got {value!r}")


def scaled_sizes(largest: int, *, smallest: int, count: int = 4) -> tuple[int, ...]:
    """``largest`` and its halves, at most ``count``, none below ``smallest``; smallest first."""
    halves = {max(smallest, largest >> shift) for shift in range(count)}
    return tuple(sorted(size for size in halves if size <= largest))
