"""One batch of the model's inputs, for remedies that need it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from esper.grafting.hooks import PassingHook
from esper.remedies import Batch


class InputSample:
    """Taken from a forward pass of the script."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handle: RemovableHandle | None = None
        self.batch: Batch | None = None

    def ready(self) -> bool:
        """A batch is there; otherwise it is taken in the next forward pass."""
        if self.batch is None and self._handle is None:
            hook = PassingHook(self._take, takes=3)
            self._handle = self._model.register_forward_pre_hook(hook, with_kwargs=True)
        return self.batch is not None

    @property
    def is_awaited(self) -> bool:
        return self._handle is not None

    def forget(self) -> None:
        self.batch = None
        self._stop_waiting()

    def _take(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.batch is None:
            self.batch = Batch(args, kwargs)
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
