"""The model's layers, as its first steps show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from esper.contracts import LayerInfo
from esper.exceptions import UnknownLayerError
from esper.fail_closed import FailClosed
from esper.grafting import LayerRecorder, slots
from esper.grafting.replicas import RankGroup
from esper.near_names import or_known

LEFT_ALONE = "attach was told to leave it alone"


class Layers:
    """Records the layers in the forward passes before the first complete step, then stops.

    Args:
        slots: names of the layers that may be grafted; the others are only watched.
        replicas: the other ranks; None for a model in one process.
        fail_closed: where a hook is reported that could not be installed, or failed.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[str],
        replicas: RankGroup | None = None,
        fail_closed: FailClosed | None = None,
    ) -> None:
        self._model = model
        self._slots = frozenset(slots)
        self._replicas = replicas
        self._recorder = LayerRecorder(model, fail_closed=fail_closed)
        self._fixed: tuple[LayerInfo, ...] | None = None

    @property
    def fixed(self) -> bool:
        """The first complete step is over, so the layers do not change any more."""
        return self._fixed is not None

    @property
    def own(self) -> tuple[LayerInfo, ...]:
        """In the model's order; shapes are known after the first forward pass."""
        if self._fixed is not None:
            return self._fixed
        return tuple(map(self._as_shared, self._recorder.layers()))

    @property
    def all(self) -> tuple[LayerInfo, ...]:
        """Also, on several ranks, the model that they share: the last one, with an empty name."""
        shared = None if self._replicas is None else self._replicas.whole_model
        return self.own if shared is None else (*self.own, shared)

    def find(self, name: str) -> LayerInfo:
        """Raises ``UnknownLayerError`` where there is none of that name."""
        found = next((layer for layer in self.all if layer.name == name), None)
        if found is None:
            known = or_known(name, (layer.name for layer in self.all))
            raise UnknownLayerError(f"the model has no layer {name!r}{known}", layer=name)
        return found

    def fix(self) -> None:
        """The first step is complete: all layers have run."""
        self._fixed = tuple(map(self._limited, map(self._as_shared, self._recorder.layers())))
        self.stop()
        without_slots = not any(True for _ in slots(self._model))
        if without_slots or any(layer.reason == LEFT_ALONE for layer in self._fixed):
            # Code that was compiled in this first step is split at the recorder's hooks, and torch
            # does not notice that they were removed. Where every layer has a slot, it stays split.
            torch.compiler.reset()

    def stop(self) -> None:
        """Remove the recorder's hooks."""
        self._recorder.stop()

    def _as_shared(self, layer: LayerInfo) -> LayerInfo:
        """As the model on all ranks allows."""
        reason = "" if self._replicas is None else self._replicas.why_not()
        return replace(layer, graftable=False, reason=reason) if reason else layer

    def _limited(self, layer: LayerInfo) -> LayerInfo:
        if layer.name in self._slots or not layer.graftable:
            return layer
        return replace(layer, graftable=False, reason=LEFT_ALONE)
