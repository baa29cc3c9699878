"""Reads the loss without waiting for a GPU."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor

from esper.health.transfers import HostCopy, RepeatedCopy, copy_to_host, is_late
from esper.sharding import is_dtensor, local


class LossReader:
    """A loss on the CPU is read at once; one on a GPU is copied, and read a step later."""

    def __init__(self) -> None:
        self._late: tuple[int, HostCopy] | None = None
        self._copies = RepeatedCopy()

    def read(self, loss: float | Tensor | None, step: int) -> tuple[int, float] | None:
        """A loss that is known now, and its step: on a GPU the previous one's.

        Raises:
            TypeError: not a number, nor a tensor of one element.
        """
        late, self._late = self._late, None
        copy: float | HostCopy | None
        if type(loss) is float:  # the usual cases, in few calls
            copy = loss
        elif type(loss) is Tensor and not loss.ndim and not loss.is_complex():
            copy = self._copies.of(loss) if is_late(loss) else loss.item()
        else:
            copy = _copy_of(loss)
        if isinstance(copy, HostCopy):
            self._late = step, copy
        elif copy is not None:
            return step, copy
        return None if late is None else (late[0], late[1].number())


def _copy_of(loss: float | Tensor | None) -> float | HostCopy | None:
    if loss is None:
        return None
    if not isinstance(loss, Tensor):
        return _number(loss)
    if is_dtensor(loss):
        return _copy_of_distributed(loss)
    if loss.numel() != 1:
        raise TypeError(f"the loss must have one element, got shape {tuple(loss.shape)}")
    if loss.is_complex():
        raise TypeError("the loss must be real, got a complex tensor")
    return copy_to_host(loss.reshape(())) if is_late(loss) else loss.item()


def _number(loss: Any) -> float:
    if not isinstance(loss, bool | str | bytes):
        with suppress(TypeError, ValueError, OverflowError):
            return float(loss)
    kind = type(loss).__name__
    raise TypeError(f"the loss must be a number or a tensor of one element, got {kind}")


def _copy_of_distributed(loss: Any) -> float | HostCopy | None:
    """None where no rank has the whole loss: summing its parts would be one more collective."""
    whole = all(placement.is_replicate() for placement in loss.placements)
    return _copy_of(local(loss)) if whole else None
