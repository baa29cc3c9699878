"""Reads gradients and updates at the end of an optimizer's step, when both exist.

A training loop may clear the gradients anywhere after the step, so later they are often gone. A
post-step hook also sees them unscaled, after clipping, and after a closure. It is called only while
a frame is due.

Shape legend: P parameters of one optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from esper.fail_closed import is_the_scripts
from esper.health.updates import Part, takes_hooks

Groups = dict[tuple[torch.device, torch.dtype], list[int]]


@dataclass(slots=True)
class StepNorms:
    """Norms on their device, by ``id`` of the parameter; nothing here waits for a GPU."""

    gradients: dict[int, Tensor] = field(default_factory=dict)
    entries: dict[int, Tensor] = field(default_factory=dict)  # how many of a gradient are not 0
    updates: dict[int, Tensor] = field(default_factory=dict)
    old_weights: dict[int, Tensor] = field(default_factory=dict)
    no_step: set[int] = field(default_factory=set)  # their optimizer has made none


class OptimizerSteps:
    """Measures one step of each optimizer when it is told to.

    Args:
        optimizers: those that train the model. One that takes no hooks is not waited for.
        clock: seconds, monotonic.

    Attributes:
        norms: what was measured since :meth:`measure_next`.
        seconds: how long that took, inside the user's steps.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], clock: Callable[[], float]
    ) -> None:
        self.norms = StepNorms()
        self.seconds = 0.0
        self._clock = clock
        self._weights_before: dict[int, Tensor] = {}
        self._others: list[Tensor] = []  # parameters of none of the optimizers
        self._counts_zeros = False
        self._due: set[int] = set()
        self._silent: set[int] = set()  # was waited for in vain, and has made no step since
        self._error: Exception | None = None
        self._watched = [o for o in optimizers if takes_hooks(o)]  # by place
        readers = enumerate(self._watched)
        self._parts = [Part(o, after=self._reader(place)) for place, o in readers]
        self._places = frozenset(range(len(self._parts)))

    @property
    def missing(self) -> bool:
        """An optimizer whose step is due has made none, and is expected to."""
        return bool(self._due - self._silent)

    def measure_next(
        self,
        weights_before: Mapping[int, Tensor],
        others: Sequence[Tensor] = (),
        *,
        counts_zeros: bool = False,
    ) -> None:
        """Measures the next step of each optimizer.

        Args:
            weights_before: copies of the weights as they are now, by ``id`` of the parameter;
                they are overwritten.
            others: parameters that none of the optimizers holds; their gradients are read too.
            counts_zeros: count the entries of the gradients that are not zero.
        """
        self.norms = StepNorms()
        self.seconds = 0.0
        self._weights_before = dict(weights_before)
        self._others = list(others)
        self._counts_zeros = counts_zeros
        self._due = set(self._places)
        for part in self._parts:
            part.arm()

    def forget_weights(self) -> None:
        """The weights were changed by someone else, so their change is no update."""
        self._weights_before = {}
        self.norms.updates, self.norms.old_weights = {}, {}

    def end(self) -> None:
        """The frame is taken; an optimizer that has not stepped is not waited for again.

        Raises:
            Exception: what a reading raised; it could not raise in the user's step.
        """
        self._silent |= self._due
        groups = (group for place in self._due for group in self._watched[place].param_groups)
        self.norms.no_step = {id(p) for group in groups for p in group["params"]}
        self._due = set()
        for place, part in enumerate(self._parts):
            part.arm(place in self._silent)  # to see that it makes steps again
        self._weights_before = {}
        self._others = []
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        for part in self._parts:
            part.remove()
        self._due = set()

    def _reader(self, place: int) -> Callable[..., None]:
        # Not FailClosed: a reading that fails is no lasting state; the session's health part
        # counts it, and switches off what goes on failing.
        def read(optimizer: torch.optim.Optimizer) -> None:
            self._silent.discard(place)
            if place not in self._due:
                return
            self._due.discard(place)
            started = self._clock()
            try:
                with torch.no_grad():
                    self._read(optimizer)
            except Exception as error:
                if is_the_scripts(error):
                    raise
                self._error = error
            self.seconds += self._clock() - started

        return read

    def _read(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._read_gradients(parameters, left_scale(optimizer))
        unread = [p for p in self._others if id(p) not in self.norms.gradients]
        self._read_gradients(unread, None)
        self._read_updates([p for p in parameters if id(p) in self._weights_before])

    def _read_gradients(self, parameters: Sequence[Tensor], scale: Tensor | None) -> None:
        trained = [p for p in parameters if p.grad is not None and has_numbers(p)]
        if not trained:
            return
        gradients = [dense(p.grad) for p in trained]
        for p, norm in zip(trained, norms_of(gradients), strict=True):
            if norm is not None:
                self.norms.gradients[id(p)] = norm if scale is None else norm / scale.to(norm)
        if self._counts_zeros:
            for p, count in zip(trained, norms_of(gradients, 0.0), strict=True):
                if count is not None:
                    self.norms.entries[id(p)] = count

    def _read_updates(self, parameters: Sequence[Tensor]) -> None:
        if not parameters:
            return
        before = [self._weights_before[id(p)] for p in parameters]
        for p, norm in zip(parameters, norms_of(before), strict=True):
            if norm is not None:
                self.norms.old_weights[id(p)] = norm
        # Reuses the copies: they become w_old - w_new.
        torch._foreach_sub_(before, [p.detach() for p in parameters])
        for p, norm in zip(parameters, norms_of(before), strict=True):
            if norm is not None:
                self.norms.updates[id(p)] = norm


def norms_of(tensors: Sequence[Tensor | None], order: float = 2.0) -> list[Tensor | None]:
    """Norms by fused calls, one for each device and dtype; None for None and for no elements."""
    norms: list[Tensor | None] = [None] * len(tensors)
    groups: Groups = {}
    for i, tensor in enumerate(tensors):
        if tensor is not None and tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    for (_, dtype), members in groups.items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        group = [tensor for i in members if (tensor := tensors[i]) is not None]
        for i, norm in zip(members, torch._foreach_norm(group, order, dtype=wide), strict=True):
            norms[i] = norm
    return norms


def spread_sample(tensor: Tensor, most: int) -> Tensor:
    """At most so many elements, spread over the rows and over the columns.

    A step that shares a divisor with the columns would take a few columns again and again, such as
    a corner of all images, which is always zero: its weights have no gradient, and never move.
    """
    flat = tensor.reshape(-1)
    step, columns = max(1, flat.numel() // most), math.prod(tensor.shape[1:])
    while math.gcd(step, columns) > 1:
        step += 1
    return flat[::step][:most]


def dense(gradient: Tensor | None) -> Tensor | None:
    """The values of a sparse gradient have the same norm as the gradient."""
    if gradient is None:
        return None
    values = gradient.coalesce().values() if gradient.is_sparse else gradient.detach()
    return values if has_numbers(values) else None


def has_numbers(tensor: Tensor) -> bool:
    """False where no norm can be taken: integers, a lazy or meta tensor, packed or quantised ones.

    A tensor subclass that wraps others defines its own operations, and seldom norms.
    """
    if is_lazy(tensor) or tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided:
        return False
    wraps_others = hasattr(tensor, "__tensor_flatten__")
    return tensor.is_floating_point() and tensor.itemsize > 1 and not wraps_others


def is_freed(tensor: Tensor) -> bool:
    """The script has freed the memory of its numbers; False for devices that show no memory."""
    try:
        return bool(tensor.numel()) and not tensor.untyped_storage().nbytes()
    except RuntimeError:
        return False


def left_scale(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """What the gradients are still multiplied by; None where they are unscaled.

    A ``GradScaler`` leaves unscaling to an optimizer that can do it inside its step. Such a step
    stores the unscaled gradients, except where it finds one that is not finite.
    """
    scale = getattr(optimizer, "grad_scale", None)
    skipped = getattr(optimizer, "found_inf", None)
    if not isinstance(scale, Tensor) or not isinstance(skipped, Tensor):
        return None
    return torch.where(skipped > 0, scale, torch.ones_like(scale)).reshape(())
