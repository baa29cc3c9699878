"""Runs a gradient reduction beside the backward pass, and certifies its sums."""

from __future__ import annotations

import logging
import math
import time
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor, distributed

from esper.blueprints import Blueprint
from esper.blueprints.gradient_reduction import GradientReduction
from esper.contracts import Certificate, LayerInfo

logger = logging.getLogger("esper")

LARGEST_SAMPLE = 25 * 1024 * 1024 // 4  # numbers in one of DDP's buckets of float32


class BucketThread:
    """Sums DDP's buckets one after the other, in DDP's order.

    One thread, because all ranks must keep the same order.

    Args:
        group: a gloo group that nothing else uses during a backward pass.
    """

    def __init__(self, reduction: GradientReduction, group: distributed.ProcessGroup) -> None:
        self.reduction = reduction
        self._group = group
        self._jobs: SimpleQueue[tuple[Tensor, Any] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="esper-reduction", daemon=True)
        self._thread.start()

    def submit(self, flat: Tensor) -> torch.futures.Future[Tensor]:
        """Starts to average ``flat`` over the ranks, in place."""
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._jobs.put((flat, future))
        return future

    def close(self) -> None:
        """Ends the thread after the submitted buckets."""
        self._jobs.put(None)

    def _work(self) -> None:
        size = distributed.get_world_size(self._group)
        while (job := self._jobs.get()) is not None:
            flat, future = job
            try:
                flat.div_(size)  # first, as torch's hooks do: half precision overflows later
                self.reduction.add_up(flat, self._group)
                future.set_result(flat)
            except Exception as error:
                logger.exception("the gradients could not be summed over the ranks")
                future.set_exception(error)


def sum_in_background(thread: BucketThread, bucket: Any) -> torch.futures.Future[Tensor]:
    """A DDP communication hook; its state is the thread."""
    return thread.submit(bucket.buffer())


def certify_reduction(
    layer: LayerInfo, blueprint: Blueprint, reduction: GradientReduction, group: Any
) -> Certificate:
    """Sums generated gradients with it and with torch's all-reduce, and compares. Collective.

    The limit is what another order of the additions can change: (n - 1) · ε · Σ|x|.
    """
    flat = _made_up_gradient(layer, int(distributed.get_rank(group)))
    wanted, magnitude = flat.clone(), flat.abs()
    distributed.all_reduce(magnitude, group=group)
    plain_ms = _timed(lambda: distributed.all_reduce(wanted, group=group))
    exchange_ms = _timed(lambda: reduction.add_up(flat, group))
    difference = (flat.double() - wanted.double()).abs().nan_to_num(nan=math.inf)
    ranks = distributed.get_world_size(group)
    tolerance = (ranks - 1) * torch.finfo(flat.dtype).eps * float(magnitude.max())
    max_abs_diff = float(difference.max())
    preserving = max_abs_diff <= tolerance
    logger.info(
        "%s: %d numbers summed over %d ranks in %.2f ms, %.2f MiB sent; torch's all-reduce took "
        "%.2f ms",
        blueprint.slug,
        flat.numel(),
        ranks,
        exchange_ms,
        reduction.signals()["sent_mib"],
        plain_ms,
    )
    reduction.forget()
    wrong = f"its sums differ by {max_abs_diff:.3g}; the limit is {tolerance:.3g}"
    return Certificate(
        max_abs_diff=max_abs_diff,
        tolerance=tolerance,
        preserving=preserving,
        live=True,  # it has no tensors
        rng_neutral=True,  # the sample comes from a generator of its own
        parameters=0,
        parameters_declared=0,
        host_untouched=True,  # no forward pass runs it
        undo_exact=None,
        memory_mib=flat.numel() * flat.element_size() / 2**20,
        latency_ms=exchange_ms,
        failures=() if preserving else (wrong,),
    )


def _made_up_gradient(layer: LayerInfo, rank: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(rank)
    size = min(layer.parameters, LARGEST_SAMPLE)
    values = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
    return values.to(getattr(torch, layer.dtype))


def _timed(work: Any) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3
