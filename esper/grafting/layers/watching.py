"""Shows layers to Esper, wherever they run: eager ones by hooks, compiled ones in a copy.

An eager layer is seen in the training's own forward pass. For layers inside compiled code, one
forward pass of a copy (:mod:`esper.grafting.layers.eager_pass`) runs beside the next training step,
on some of its rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from esper.contracts import LayerInfo
from esper.fail_closed import FailClosed
from esper.grafting.compiled import Compilation
from esper.grafting.layers.eager_pass import run_copy
from esper.grafting.layers.graph import LayerRecorder
from esper.grafting.slot import Watcher, watch

COPY = "pass of an eager copy"
_NO_LAYERS = "Esper does not know the shapes of compiled layers, so they take no graft."
_NO_ACTIVATIONS = "The activations of compiled layers are not measured."


class LayerWatch:
    """Calls watchers with a layer's input and output, until they are ended.

    Args:
        fail_closed: where it is reported that compiled layers cannot be seen.
    """

    def __init__(
        self, model: nn.Module, compilation: Compilation, fail_closed: FailClosed | None = None
    ) -> None:
        self._model = model
        self._compilation = compilation
        self._fail_closed = fail_closed or FailClosed()
        self._compiled: dict[int, tuple[str, Watcher]] = {}
        self._next = 0
        self._end: Callable[[], None] | None = None
        self._seconds = 0.0

    def __call__(self, layer: str, watcher: Watcher) -> Callable[[], None]:
        """As :func:`esper.grafting.watch`; a compiled layer is shown once, at the next step."""
        if not self._compilation.covers(layer):
            return watch(self._model, layer, watcher)
        key, self._next = self._next, self._next + 1
        if self._end is None and not self._fail_closed.is_off(COPY):
            closed = {"part": COPY, "unmeasured": _NO_ACTIVATIONS}
            read = self._fail_closed.wrap(self._show, **closed)
            self._end = self._compilation.before_forward(read)
        self._compiled[key] = layer, watcher

        def end() -> None:
            self._compiled.pop(key, None)
            if not self._compiled:
                self._stop()

        return end

    def take_seconds(self) -> float:
        """Host time of copies since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _show(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Evaluation runs without gradients: its activations are not those that train.
        if not torch.is_grad_enabled():
            return
        self._stop()
        started = time.perf_counter()
        try:
            run_copy(self._model, args, kwargs, self._look, gradients=True)
        finally:
            self._seconds += time.perf_counter() - started

    def _look(self, copied: nn.Module) -> None:
        for layer, watcher in self._compiled.values():
            watch(copied, layer, watcher)

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
            self._end = None


class CopyRecorder:
    """As :class:`LayerRecorder`, for a model with compiled parts: it traces a copy, once."""

    def __init__(
        self, model: nn.Module, compilation: Compilation, fail_closed: FailClosed | None = None
    ) -> None:
        self._model = model
        self._fail_closed = fail_closed or FailClosed()
        unseen = LayerRecorder(model)
        unseen.stop()
        self._layers = unseen.layers()
        read = self._fail_closed.wrap(self._record, part=COPY, unmeasured=_NO_LAYERS)
        self._end: Callable[[], None] | None = compilation.before_forward(read)

    @property
    def done(self) -> bool:
        """True after the first forward pass, or after :meth:`stop`."""
        return self._end is None

    def retire(self) -> None:
        """As :meth:`stop`: its hook is outside of compiled code."""
        self.stop()

    def stop(self) -> None:
        """Removes the hook now."""
        if self._end is not None:
            self._end()
            self._end = None

    def layers(self) -> tuple[LayerInfo, ...]:
        """All layers in order of execution; those that never ran come last, with the reason."""
        return self._layers

    def _record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.stop()
        recorders: list[LayerRecorder] = []

        def look(copied: nn.Module) -> None:
            recorders.append(LayerRecorder(copied, fail_closed=self._fail_closed))

        run_copy(self._model, args, kwargs, look, whole_batch=True)
        self._layers = recorders[-1].layers()
