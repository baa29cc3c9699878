"""Reads the loss without waiting for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossReader:
    """A loss on the CPU is read at once; one on a GPU is copied, and read a step later."""

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, Any] | None = None

    def read(self, loss: float | Tensor | None) -> float | None:
        """This step's loss; on a GPU the previous step's, None at the first and without one.

        Raises:
            TypeError: not a number, nor a tensor of one element.
        """
        if loss is None:
            return None
        if not isinstance(loss, Tensor):
            if isinstance(loss, bool | str | bytes):
                raise TypeError(f"the loss must be a number or a tensor, got {loss!r}")
            return float(loss)
        if loss.numel() != 1:
            raise TypeError(f"the loss must have one element, got shape {tuple(loss.shape)}")
        if loss.device.type != "cuda":
            return loss.item()
        return self._read_late(loss)

    def _read_late(self, loss: Tensor) -> float | None:
        waiting = self._waiting
        copy = torch.empty((), dtype=torch.float32, pin_memory=True)
        copy.copy_(loss.detach().reshape(()), non_blocking=True)
        event = torch.cuda.current_stream(loss.device).record_event()
        self._waiting = (copy, event)
        if waiting is None:
            return None
        value, done = waiting
        done.synchronize()  # the end of the last step, not of the one that is being computed
        return value.item()
