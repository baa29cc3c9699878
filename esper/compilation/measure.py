"""How long a graft takes at the layer's real shape, on this device."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from esper.blueprints import Graft

FEWEST, MOST = 5, 30
ENOUGH_MS = 5.0


def latency_ms(graft: Graft, x: Tensor, y: Tensor, *, rows: int) -> float:
    """Time of one forward pass through the graft, on an undisturbed device.

    The best of a few: on a worker that shares its cores, everything else measures the neighbours
    (seen: median 16 ms for a graft of 0.05 ms, which then broke a limit that it keeps).

    Args:
        x: a sample of the layer's input, y: of its output, both [batch, ...].
        rows: batch size to measure at; the sample is repeated up to there.

    Returns:
        Milliseconds, without the host layer's own time.
    """
    x_full, y_full = _with_rows(x, rows), _with_rows(y, rows)
    times: list[float] = []
    with torch.no_grad():
        # One more than counts: the first one pays for caches and kernels' start.
        while len(times) <= FEWEST or (len(times) <= MOST and sum(times) < ENOUGH_MS):
            _synchronise(x)
            started = time.perf_counter()
            graft.combine(x_full, y_full)
            _synchronise(x)
            times.append((time.perf_counter() - started) * 1e3)
    return min(times[1:])


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    if not tensor.dim() or not len(tensor) or rows <= len(tensor):
        return tensor
    times = -(-rows // len(tensor))
    return tensor.repeat(times, *(1 for _ in tensor.shape[1:]))[:rows]


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
