"""Layers that did not run in the first step: an expert that was not chosen, a head of later phases.

A hook on each of them costs nothing until the layer is called. Then the next forward pass is
recorded whole, as the first one was, so that its order and its neighbours are known too.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle

from esper.contracts import LayerInfo
from esper.fail_closed import FailClosed
from esper.grafting.hooks import PassingHook, register_alike
from esper.grafting.layers.graph import LayerRecorder

PART = "look for late layers"
_UNKNOWN = "Esper does not know the layer's shapes, so it takes no graft."


class LateLayers:
    """Waits for layers to run for the first time.

    A router may choose another expert in the pass that is recorded. Each recording that showed
    nothing new doubles the steps to the next.

    Args:
        names: of the layers that have not run.
        fail_closed: where a hook is reported that could not be installed, or failed.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], fail_closed: FailClosed) -> None:
        self._model = model
        self._fail_closed = fail_closed
        self._has_run = False
        self._recorder: LayerRecorder | None = None
        self._steps = 0
        self._not_before = 0
        self._wait = 1
        self._handles: dict[str, RemovableHandle] = {}
        for name in names:
            self._await(name)

    def on_step(self) -> dict[str, LayerInfo]:
        """A step is over; name -> what the recorded pass showed of each layer that ran in it.

        Empty where it showed no layer that was waited for.
        """
        self._steps += 1
        if self._recorder is not None:
            return self._read(self._recorder)
        if self._has_run and self._steps >= self._not_before:
            self._has_run = False
            self._recorder = LayerRecorder(self._model, fail_closed=self._fail_closed)
        return {}

    def stop(self) -> None:
        """Removes all hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None

    def _await(self, name: str) -> None:
        closed = {"part": PART, "layer": name, "unmeasured": _UNKNOWN}
        hook = PassingHook(self._fail_closed.wrap(self._note, **closed))
        module = self._model.get_submodule(name)
        handle = self._fail_closed.run(lambda: register_alike("late", module, hook), **closed)
        if handle is not None:
            self._handles[name] = handle

    def _note(self, *_: object) -> None:
        self._has_run = True

    def _read(self, recorder: LayerRecorder) -> dict[str, LayerInfo]:
        seen = {info.name: info for info in recorder.layers() if info.in_shape}
        recorder.stop()
        self._recorder = None
        fresh = seen.keys() & self._handles.keys()
        for name in fresh:
            self._handles.pop(name).remove()
        self._wait = 1 if fresh else 2 * self._wait
        self._not_before = self._steps + self._wait
        return seen if fresh else {}
