"""Measures a graft's time and memory at the layer's real shape, on this device."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper.blueprints import Graft
from esper.blueprints.base import MIB
from esper.contracts import MeasuredCost

FEWEST, MOST = 5, 30
ENOUGH_MS = 2.5  # of each kind: a cold build takes tens of milliseconds in total


def cost(graft: Graft, x: Tensor, y: Tensor, *, rows: int) -> tuple[float, MeasuredCost]:
    """Measures time and memory of forward and backward.

    Args:
        x: a sample of the layer's input, y: of its output, both [batch, ...].
        rows: batch size of the measurement; the sample is repeated to reach it.

    Returns:
        (the best forward time in ms, without the host layer; all measured values).
        Limits use the best time: on a worker with shared cores, other statistics depend on the
        load (measured: median 16 ms for a graft of 0.05 ms, which then exceeded a limit).
    """
    x_full, y_full = _with_rows(x, rows), _with_rows(y, rows)

    def forward() -> Tensor:
        with torch.no_grad():
            return graft.combine(x_full, y_full)

    forward_ms = _times_ms(lambda: None, lambda _: forward(), x)
    backward_ms, peak_memory_mib = _with_gradients(graft, x_full, y_full)
    return forward_ms[0], MeasuredCost(
        forward_p50_ms=_at(forward_ms, 0.5),
        forward_p95_ms=_at(forward_ms, 0.95),
        backward_p50_ms=_at(backward_ms, 0.5),
        backward_p95_ms=_at(backward_ms, 0.95),
        peak_memory_mib=peak_memory_mib,
    )


def _with_gradients(graft: Graft, x: Tensor, y: Tensor) -> tuple[list[float], float]:
    """(sorted backward times in ms, peak MiB); x and y act as parts of a longer graph."""
    x = x.detach().requires_grad_(x.is_floating_point())
    y = y.detach().requires_grad_(y.is_floating_point())
    inputs = [t for t in (*graft.parameters(), x, y) if t.requires_grad]

    def backward(output: Tensor) -> None:
        torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)

    with torch.enable_grad():
        with _peak_bytes(x) as peak:
            backward(graft.combine(x, y))
        times = _times_ms(lambda: graft.combine(x, y), backward, x)
    return times, peak() / MIB


def _times_ms(prepare: Callable[[], Any], timed: Callable[[Any], Any], x: Tensor) -> list[float]:
    times: list[float] = []
    # One more than is counted: the first includes caches and kernel start.
    while len(times) <= FEWEST or (len(times) <= MOST and sum(times) < ENOUGH_MS):
        given = prepare()
        _synchronise(x)
        started = time.perf_counter()
        timed(given)
        _synchronise(x)
        times.append((time.perf_counter() - started) * 1e3)
    return sorted(times[1:])


def _at(ordered: list[float], share: float) -> float:
    """The quantile: the value that this share of the sorted values does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextmanager
def _peak_bytes(x: Tensor) -> Iterator[Callable[[], int]]:
    """Counts allocations inside the block; yields a function that returns the peak."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        yield lambda: torch.cuda.max_memory_allocated(x.device) - before
    else:
        with _Storages() as storages:
            yield lambda: storages.peak


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is untyped
    """Sums the live storages that operations create, because the CPU allocator has no counter."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs or {}))
            if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    if not tensor.dim() or not len(tensor) or rows <= len(tensor):
        return tensor
    times = -(-rows // len(tensor))
    return tensor.repeat(times, *(1 for _ in tensor.shape[1:]))[:rows]


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
