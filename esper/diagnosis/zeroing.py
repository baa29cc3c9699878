"""What the backward passes of the first updates start from, and what of them an update uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.diagnosis.facts import Zeroing
from esper.grafting.guard import gradient_values
from esper.grafting.hooks import PassingHook
from esper.health.optimizer_steps import has_numbers
from esper.health.transfers import HostCopy, HostTransfer, copy_to_host

WATCHED_UPDATES = 8  # for which the start of the backward pass is known
WATCHED_BACKWARDS = 64  # of each of them
SAME_DIRECTION = 0.9999  # cosine


class ZeroingProbe:
    """Whether gradients were cleared between two updates, from one parameter's own hook.

    Attributes:
        done: enough updates were seen.
    """

    def __init__(self, closed: Callable[..., Any]) -> None:
        self._closed = closed
        self._handle: RemovableHandle | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        # For each update, what each of its backward passes started from: a gradient that is not 0.
        self._left: list[list[HostCopy | None]] = []
        # For each whole update: the optimizer used the gradient that was there before.
        self._accumulated: list[bool] = []
        # For each whole update: its gradient is that of the last backward pass alone.
        self._newest_alone: list[HostCopy | None] = []
        self._newest: Tensor | None = None  # a few elements of what a backward pass has added
        self._smallest: nn.Parameter | None = None
        self._old = 0  # id of the gradient that the first backward pass found
        self._asked: tuple[list[nn.Parameter], HostTransfer] | None = None
        self._first = True
        self._in_step = False
        self.done = False

    def on_update_begins(self, optimizer: torch.optim.Optimizer) -> None:
        """The script has called the optimizer, which may call the model in a closure."""
        self._in_step = self._in_step or optimizer is self._optimizer

    def on_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step is over: the next backward pass is the first of an update."""
        is_other = self._optimizer is not None and self._optimizer is not optimizer
        if self.done or is_other:
            return
        self._in_step = False
        if self._smallest is not None and len(self._left) > len(self._accumulated):
            # autograd.grad gives the script a new tensor, and adds nothing to the old one.
            self._accumulated.append(id(self._smallest.grad) == self._old)
            self._newest_alone.append(self._is_newest_alone())
        if self._handle is None:
            self._watch(optimizer)
        elif len(self._left) >= WATCHED_UPDATES:
            self.close()
        self._first = True

    def facts(self) -> Zeroing:
        carried = []
        for starts, accumulated in zip(self._left, self._accumulated, strict=False):
            if any(left is not None and not left.has_arrived for left in starts):
                break
            # One from zero is enough: the backward pass of another model's loss, as in a GAN, may
            # have left a gradient here before the script cleared it.
            old = all(left is not None and left.number() != 0 for left in starts)
            carried.append(old and accumulated)
        backwards = tuple(map(len, self._left))[: len(carried)]
        # In a closure the optimizer itself begins anew at each evaluation, as L-BFGS does.
        cleared = tuple(
            alone is not None
            and alone.has_arrived
            and bool(alone.number())
            and all(left is None or left.number() == 0 for left in starts)
            for starts, alone in zip(self._left, self._newest_alone, strict=False)
        )
        return Zeroing(tuple(carried), backwards, cleared[: len(carried)])

    def _is_newest_alone(self) -> HostCopy | None:
        """Clipping may have scaled it; None: there was one backward pass, or no gradient."""
        newest, self._newest = self._newest, None
        used = None if self._smallest is None else gradient_values(self._smallest)
        if newest is None or used is None or used.numel() < newest.numel():
            return None
        used = used.detach().reshape(-1)[: newest.numel()].to(newest.dtype)
        if newest.numel() < 2:
            return None  # two numbers always have one direction
        alike = torch.nn.functional.cosine_similarity(used.float(), newest.float(), dim=0)
        return copy_to_host(alike > SAME_DIRECTION)

    def close(self) -> None:
        self.done = True
        if self._handle is not None:
            self._handle.remove()

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        """The smallest tensor that has learned in this step; on a GPU, in the step before."""
        asked, self._asked = self._asked, None
        if asked is None:
            asked = _alive(optimizer)
            if asked[1].is_late:
                self._asked = asked
                return
        smallest, transfer = asked
        alive = [
            p for p, learns in zip(smallest, transfer.take("alive"), strict=True) if learns == 1
        ]
        if not alive:
            return
        self._optimizer, parameter = optimizer, alive[0]
        self._smallest = parameter

        def before_accumulation(added: Tensor) -> None:
            self._newest = None
            if self._first:
                self._first = False
                self._left.append([])
                self._old = id(parameter.grad)
            elif not self._in_step and has_numbers(added):
                self._newest = added.detach().reshape(-1)[:64].clone()
            if not self._left or len(self._left[-1]) >= WATCHED_BACKWARDS:
                return
            left = gradient_values(parameter)
            few = None if left is None else left.detach().reshape(-1)[:64]
            self._left[-1].append(None if few is None else copy_to_host((few != 0).any()))

        self._handle = parameter.register_hook(_Unpickled(self._closed(before_accumulation)))  # type: ignore[no-untyped-call]


def _alive(optimizer: torch.optim.Optimizer) -> tuple[list[nn.Parameter], HostTransfer]:
    """The smallest tensors, and on their way to the host, which of them have a gradient."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    usable = [p for p in parameters if p.is_leaf and type(p) is nn.Parameter]
    smallest = sorted(usable, key=lambda p: p.numel())[:8]
    gradients = [gradient_values(p) for p in smallest]
    transfer = HostTransfer()
    transfer.add("alive", [None if g is None else (g != 0).any() for g in gradients])
    transfer.start()
    return smallest, transfer


class _Unpickled(PassingHook):
    """Of a tensor: pickle drops it without a warning."""

    __torch_unserializable__ = True
