"""The base classes: a blueprint, and the graft that it builds.

A blueprint is a module template. From a layer's description it tells whether it fits and why not,
its sizes and its costs, and builds a :class:`Graft`. It is stateless; one instance serves all runs.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
from esper.contracts.variants import Factors, key_of, why_no_variant
from esper.exceptions import ConfigurationError, IncompatibleLayerError
from esper.near_names import did_you_mean

MIB = 1024 * 1024
# Weight, gradient and the two moments of Adam.
COPIES_IN_TRAINING = 4


class Graft(nn.Module, ABC):
    """A module in a layer's slot.

    Attributes:
        alpha: share of a graft that replaces its host, a tensor buffer; None for all others.
        merged: it was folded into the host's weights, so it is in no slot.
        amplification: factor on what its weights compute. A step of plain gradient descent goes its
            square too far, once for the gradient and once for the output.
    """

    alpha: Tensor | None
    merged: bool = False
    amplification: float = 1.0

    def __init__(self) -> None:
        super().__init__()
        # Not a plain class attribute: that would hide a buffer of the same name.
        self.register_buffer("alpha", None)

    @abstractmethod
    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's new output.

        Args:
            x: the layer's input.
            y: the layer's output after older grafts, of any batch size.

        Returns:
            Same shape, dtype and device as ``y``. Neither ``x`` nor ``y`` is written to.
        """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.combine(x, y)

    def inherit(self, host: nn.Module) -> None:
        """Called once, before the certificate and the insertion; copies values of the host.

        Raises:
            TypeError: this host does not have the values that the graft needs.
        """

    def on_step(self) -> None:
        """Called after each optimizer step; advances schedules, such as that of ``alpha``.

        A session calls it. Without a session, the training loop must call it. It only changes
        buffers, so that an undo or a checkpoint restores the schedule with the weights.
        """

    def join(self, neighbours: Sequence[Graft]) -> None:
        """Called when the grafts of its slot have changed, with all of them.

        Args:
            neighbours: all grafts of the slot, with this one, oldest first. Keep them in a tuple;
                torch would register a list's items as children.
        """

    def attach(self, host: nn.Module) -> None:
        """Called before each ``combine`` while gradients are on; registers hooks on the host."""

    def detach(self) -> None:
        """Called when the graft is removed; undoes ``attach``."""

    def signals(self) -> dict[str, float]:
        """Latest measurements, NaN if none yet. Reads from the device, so not for each step."""
        return {}

    def forget(self) -> None:
        """Discards all measurements; called after the trial of the graft."""

    def merge(self, host: nn.Module) -> None:
        """Folds the graft into the host's weights, so that it can be removed.

        Raises:
            TypeError: this graft, or this host, cannot be merged.
        """
        raise TypeError(f"{type(self).__name__} cannot be merged into a {type(host).__name__}")


def introduce(grafts: Sequence[Graft]) -> None:
    """Tells each graft of a slot, oldest first, about all of them."""
    for graft in grafts:
        graft.join(grafts)


class Blueprint(ABC):
    """One entry of the catalogue; each file in ``catalog/`` defines one."""

    slug: ClassVar[str]
    id: ClassVar[str]
    title: ClassVar[str]
    category: ClassVar[BlueprintCategory]
    kind: ClassVar[GraftKind]
    adaptation_type: ClassVar[AdaptationType]
    risk: ClassVar[Risk]
    mergeable: ClassVar[bool] = False
    trainable: ClassVar[bool] = True
    parts: ClassVar[int] = 1  # number of blueprints in it; more than one for a composition
    spans: ClassVar[bool] = False  # its graft may read the input of an earlier layer
    # Numbers of its configuration of which variants may be learned; "part.setting" of a part.
    tunes: ClassVar[tuple[str, ...]] = ()
    idea: ClassVar[str]
    source: ClassVar[str]
    when: ClassVar[str]
    conflicts: ClassVar[frozenset[str]] = frozenset()
    # The layer must have one of these slugs before this one is grafted, and as long as it stays.
    requires: ClassVar[frozenset[str]] = frozenset()
    # Why it cannot be used with a gradient scaler; empty if it can.
    scaler_refusal: ClassVar[str] = ""
    # Why it cannot be used in a model with replicas on other ranks; empty if it can.
    replicas_refusal: ClassVar[str] = ""
    # Allowed relative difference right after the graft; 0 for all grafts beside the host.
    tolerance: ClassVar[float] = 0.0

    @cached_property
    def version(self) -> str:
        """First 16 hex digits of the SHA-256 of the catalogue file and its base classes' files."""
        total = hashlib.sha256()
        for cls in type(self).__mro__[: type(self).__mro__.index(Blueprint)]:
            total.update(Path(inspect.getfile(cls)).read_bytes())
        return total.hexdigest()[:16]

    @abstractmethod
    def supports(self, layer: LayerInfo) -> str:
        """Empty if the blueprint fits the layer, otherwise a sentence that says why not."""

    def refusal(self, layer: LayerInfo) -> str:
        """As :meth:`supports`, also for the place of a graft that spans layers."""
        if layer.since and not self.spans:
            return "it acts on one layer and cannot span several; leave since= out"
        return self.supports(layer)

    @abstractmethod
    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        """All candidate configurations, smallest first; JSON values only."""

    @abstractmethod
    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        """The configuration that is used if none is given."""

    @abstractmethod
    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        """The exact number of the graft's parameters."""

    @abstractmethod
    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        """Operations of one forward pass at the traced shape; a multiply-add counts two."""

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        """Bytes that the graft keeps for backward at the traced shape, without x and y."""
        return 0

    @abstractmethod
    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        """Builds the module for a checked configuration."""

    def check_config(self, config: dict[str, Any]) -> None:  # noqa: B027 - most blueprints have no values to check
        """Raises ``ConfigurationError`` for values that are invalid at every layer."""

    def config_for(self, layer: LayerInfo, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """The default configuration, updated with ``given`` and checked.

        Raises:
            ConfigurationError: an unknown key or an invalid value.
            IncompatibleLayerError: the layer does not fit.
        """
        reason = self.refusal(layer)
        if reason:
            raise IncompatibleLayerError(layer=layer.name, blueprint=self.slug, reason=reason)
        config = self.default_config(layer)
        unknown = sorted(set(given or {}) - set(config))
        if unknown:
            raise ConfigurationError(
                f"{self.slug} has no setting {', '.join(unknown)}{did_you_mean(unknown[0], config)}"
                f"; it has: {', '.join(config) or 'none'}"
            )
        config.update(given or {})
        self.check_config(config)
        return config

    def varied(self, layer: LayerInfo, factors: Factors) -> dict[str, Any]:
        """The configuration of a variant at this layer.

        Raises:
            ConfigurationError: the grammar has no such variant, or it has no other size here.
            IncompatibleLayerError: the layer does not fit.
        """
        reason = why_no_variant(factors, self.tunes)
        if reason:
            raise ConfigurationError(f"{self.slug}: {reason}")
        usual = self.config_for(layer)
        found = self.config_for(layer, _scaled(usual, factors))
        if found == usual:
            raise ConfigurationError(f"{self.slug}: {key_of(factors)} is the usual size here")
        return found

    def factors_of(self, layer: LayerInfo, config: dict[str, Any]) -> dict[str, float]:
        """A configuration against the usual one, of each setting that is tuned.

        Raises:
            IncompatibleLayerError: the layer does not fit.
        """
        usual = self.config_for(layer)
        return {
            setting: float(_setting(config, setting)) / float(_setting(usual, setting))
            for setting in self.tunes
        }

    def forecast(self, layer: LayerInfo, config: dict[str, Any]) -> CostForecast:
        """Cost computed from shapes; nothing is measured, so latency is unknown (NaN)."""
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
        """Builds a graft that does not change the layer's output at first, from ``seed`` alone.

        Uses no global random stream, so it may run in a thread beside the training.

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


def _scaled(usual: dict[str, Any], factors: Factors) -> dict[str, Any]:
    """The usual values of the settings, multiplied; a whole number stays one, of at least 1."""
    found: dict[str, Any] = {}
    for setting, factor in factors.items():
        *parts, name = setting.split(".")
        value = _setting(usual, setting)
        inner = found
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[name] = max(1, round(value * factor)) if isinstance(value, int) else value * factor
    return found


def _setting(config: Mapping[str, Any], setting: str) -> Any:
    value: Any = config
    for part in setting.split("."):
        value = value[part]
    return value


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
