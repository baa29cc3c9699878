"""The base of the blueprints that sum gradients between ranks.

They belong to no layer: they replace DDP's all-reduce for the whole model.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from typing import Any

from torch import Tensor, distributed

from esper.blueprints.base import Blueprint, Graft
from esper.blueprints.initial import Initializer
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, LayerInfo, Risk

MIB = 1024 * 1024
WHOLE_MODEL_KIND = "DistributedDataParallel"


class GradientReduction(Graft):
    """Sums a flat gradient over the ranks of a group; the forward pass does not change."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes_sent = 0
        self._seconds = 0.0
        self._sums = 0

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def add_up(self, flat: Tensor, group: distributed.ProcessGroup) -> None:
        """Replaces ``flat`` [n] by its sum over the group; bit-equal on all ranks."""
        started = time.perf_counter()
        self._bytes_sent += self.reduce(flat, group)
        self._seconds += time.perf_counter() - started
        self._sums += 1

    @abstractmethod
    def reduce(self, flat: Tensor, group: distributed.ProcessGroup) -> int:
        """Sums ``flat``; returns the number of bytes that this rank has sent."""

    def signals(self) -> dict[str, float]:
        """Averages over all sums so far."""
        if not self._sums:
            return {"sent_mib": math.nan, "exchange_ms": math.nan}
        return {
            "sent_mib": self._bytes_sent / self._sums / MIB,
            "exchange_ms": self._seconds / self._sums * 1e3,
        }

    def forget(self) -> None:
        self._bytes_sent, self._seconds, self._sums = 0, 0.0, 0


class ReductionBlueprint(Blueprint):
    """A blueprint without settings and weights that is grafted into the model as a whole."""

    category = BlueprintCategory.ROUTING
    kind = GraftKind.DISTRIBUTED
    adaptation_type = AdaptationType.ADD_ROUTING
    risk = Risk.MEDIUM
    trainable = False

    def supports(self, layer: LayerInfo) -> str:
        if layer.kind != WHOLE_MODEL_KIND:
            return "it sums the gradients of a whole model and needs at least 2 ranks"
        return "" if layer.graftable else layer.reason

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {}

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        return ({},)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return 0

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return 0  # of the forward pass

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return self.make_reduction()

    @abstractmethod
    def make_reduction(self) -> GradientReduction:
        """Creates one; it has no settings."""
