"""Small measured numbers on their way to the host, without waiting for a GPU.

Each device's numbers are packed into one tensor there. On CUDA that tensor is copied into pinned
host memory behind the work that is queued already, and an event tells when it has arrived; on
other devices it is there at once.

Shape legend: N tensors that were added together, K numbers in each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Event(Protocol):
    """When a copy is done; a ``torch.cuda.Event``."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def record(self, stream: Any = None) -> None: ...


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A tensor in host memory; its numbers are there when the event is done. None: at once."""

    tensor: Tensor
    event: Event | None

    @property
    def has_arrived(self) -> bool:
        """Does not wait."""
        return self.event is None or self.event.query()

    def wait(self) -> Tensor:
        """The tensor with its numbers.

        A step later this waits only where the host is more than a whole step ahead of the device,
        and then the device has the work of that step.
        """
        if self.event is not None and not self.event.query():
            self.event.synchronize()
        return self.tensor

    def number(self) -> float:
        """The number of a tensor of shape []; waits as :meth:`wait` does."""
        return self.wait().item()


def is_late(tensor: Tensor) -> bool:
    """Reading it at once would wait for all queued work of its device."""
    return tensor.is_cuda


def copy_to_host(tensor: Tensor) -> HostCopy:
    """Begins to copy a tensor; waits only for a device other than CPU and CUDA."""
    if not is_late(tensor):
        return HostCopy(tensor.detach().cpu(), None)
    return _copy_behind(tensor.detach())


def _copy_behind(tensor: Tensor, used: HostCopy | None = None) -> HostCopy:
    """``used``: an earlier copy of the same form, which is overwritten."""
    stream = torch.cuda.current_stream(tensor.device)
    if used is not None and used.event is not None:
        used.tensor.copy_(tensor, non_blocking=True)
        used.event.record(stream)
        return used
    with torch.inference_mode(False):  # it may be written to again, outside of such a block
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return HostCopy(host, stream.record_event())


class RepeatedCopy:
    """Copies one number of a GPU after the other, in host memory that is allocated once.

    A copy is valid until the next but one of the same device and dtype.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[torch.device, torch.dtype], list[HostCopy]] = {}

    def of(self, number: Tensor) -> HostCopy:
        """A tensor of shape [] on a GPU; the copy arrives behind the work that is queued."""
        known = self._copies.setdefault((number.device, number.dtype), [])
        # Two in turns: the one before this one has not been read.
        used = known.pop(0) if len(known) == 2 else None
        known.append(_copy_behind(number.detach(), used))
        return known[-1]


@dataclass(frozen=True, slots=True)
class _Part:
    """Where the rows of one name lie in a device's packed numbers."""

    device: torch.device
    rows: list[int]
    begin: int
    width: int  # K


class HostTransfer:
    """Numbers that are sent together: :meth:`add` them, :meth:`start`, then :meth:`take` them."""

    def __init__(self) -> None:
        self._packed: dict[torch.device, list[Tensor]] = {}
        self._sizes: dict[torch.device, int] = {}
        self._places: dict[str, tuple[int, list[_Part]]] = {}
        self._copies: dict[torch.device, HostCopy] = {}
        self._arrived: dict[torch.device, np.ndarray] = {}

    def add(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """Tensors of shape [] or [K], all alike; None for those that are not known."""
        by_device: dict[torch.device, list[int]] = {}
        for row, tensor in enumerate(tensors):
            if tensor is not None:
                by_device.setdefault(tensor.device, []).append(row)
        parts = []
        for device, rows in by_device.items():
            group = [tensor for row in rows if (tensor := tensors[row]) is not None]
            stacked = torch.stack(group).detach()
            packed = stacked.to(_wide(device)).flatten()
            width = stacked.shape[1] if stacked.ndim > 1 else 0
            parts.append(_Part(device, rows, self._sizes.get(device, 0), width))
            self._packed.setdefault(device, []).append(packed)
            self._sizes[device] = self._sizes.get(device, 0) + packed.numel()
        self._places[name] = len(tensors), parts

    def start(self) -> None:
        """Nothing is added any more: one copy for each device begins."""
        self._copies = {
            device: copy_to_host(torch.cat(parts)) for device, parts in self._packed.items()
        }
        self._packed.clear()

    @property
    def is_late(self) -> bool:
        """Some of it arrives later."""
        return any(copy.event is not None for copy in self._copies.values())

    def names(self, prefix: str) -> list[str]:
        """The names that begin so."""
        return [name for name in self._places if name.startswith(prefix)]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def take(self, name: str, *, not_a_number: float = math.inf) -> np.ndarray:
        """What was added under this name; waits for it where it has not arrived.

        Args:
            not_a_number: what a measured NaN becomes, because NaN means "not measured".

        Returns:
            float64 [N] or [N, K]; NaN for what was not known.
        """
        count, parts = self._places[name]
        width = max((part.width for part in parts), default=0)
        found = np.full((count, width) if width else count, np.nan)
        for part in parts:
            size = len(part.rows) * max(1, part.width)
            values = self._values(part.device)[part.begin : part.begin + size]
            known: Any = np.where(np.isnan(values), not_a_number, values)
            found[part.rows] = known.reshape(-1, width) if width else known
        return found

    def _values(self, device: torch.device) -> np.ndarray:
        if device not in self._arrived:
            self._arrived[device] = self._copies[device].wait().double().numpy()
        return self._arrived[device]


def _wide(device: torch.device) -> torch.dtype:
    """Norms of float64 weights stay exact; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
