"""Repeats on a graft's gradients what the loop does to those of its optimizer's tensors alone.

``clip_grad_norm_(model.parameters())`` reaches a graft's weights. A loop that clips the tensors of
``optimizer.param_groups``, as Lightning does, or a list that it made before the graft, does not
know them. So a few gradients of the host are compared, after the last backward pass and before the
step:

multiplied      by one factor, as ``clip_grad_norm_`` does: so are the graft's
cut off         at one value, as ``clip_grad_value_`` does: so are the graft's
anything else   is not repeated, and the audit says so

Where the loop has written into a graft's gradient too, nothing is left to do. Nothing here waits
for a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.grafting.tensors.versions import writes_to
from esper.health.transfers import HostCopy, copy_to_host

WITNESSES = 8  # gradients of the host that are compared
ELEMENTS = 64  # of each of them
SEARCHED = 65_536  # elements in which the largest one is looked for, which is cut off first


@dataclass(frozen=True, slots=True)
class _Mark:
    """A gradient as a backward pass has left it; it is not kept in memory."""

    parameter: nn.Parameter
    gradient: weakref.ref[Tensor]
    version: int
    indices: Tensor | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, parameter: nn.Parameter, gradient: Tensor, *, keeps: bool) -> _Mark:
        if not keeps:
            return cls(parameter, weakref.ref(gradient), writes_to(gradient))
        indices = _few_indices(gradient)
        values = gradient.detach().reshape(-1)[indices].float()
        return cls(parameter, weakref.ref(gradient), writes_to(gradient), indices, values)

    def is_written(self) -> bool:
        """Somebody has written into it, or put another one in its place."""
        gradient = self.parameter.grad
        if gradient is None:
            return False
        return self.gradient() is not gradient or writes_to(gradient) != self.version

    def present(self) -> Tensor:
        assert self.indices is not None
        assert self.parameter.grad is not None
        return self.parameter.grad.detach().reshape(-1)[self.indices].float()


class Clipping:
    """What happened to the gradients of one optimizer since the last backward pass."""

    def __init__(self) -> None:
        self._host: list[_Mark] = []
        self._grafts: list[_Mark] = []
        self._bound: Tensor | None = None  # at which values were cut off the last time
        self._odd: HostCopy | None = None

    @property
    def unrepeated(self) -> bool:
        """The loop has changed the gradients in a way that is not repeated on the graft's."""
        return self._odd is not None and self._odd.has_arrived and bool(self._odd.number())

    @torch.no_grad()
    def mark(self, host: Sequence[nn.Parameter], grafts: Sequence[nn.Parameter]) -> None:
        """A backward pass is over."""
        having = [p for p in host if type(p.grad) is Tensor and _has_numbers(p.grad)]
        chosen = having[:: max(1, -(-len(having) // WITNESSES))]
        self._host = [_Mark.of(p, p.grad, keeps=True) for p in chosen if p.grad is not None]
        self._grafts = [_Mark.of(p, p.grad, keeps=False) for p in grafts if p.grad is not None]

    def forget(self) -> None:
        """The gradients were used, or restored."""
        self._host, self._grafts = [], []

    @torch.no_grad()
    def repeat(self, unscaled_by: Tensor | None) -> None:
        """The gradients of a step are complete: treat the graft's as the host's were treated.

        Args:
            unscaled_by: what a ``GradScaler`` has multiplied the host's gradients by since, which
                the graft's are multiplied by as they arrive; None: nothing.
        """
        host, grafts = self._host, self._grafts
        self.forget()
        if not grafts or any(mark.is_written() for mark in grafts):
            return
        if not any(mark.is_written() for mark in host):
            return
        host = [mark for mark in host if mark.parameter.grad is not None]
        device = grafts[0].parameter.device
        old_N = torch.cat([mark.values.to(device) for mark in host if mark.values is not None])
        new_N = torch.cat([mark.present().to(device) for mark in host])
        if unscaled_by is not None:
            old_N = old_N * unscaled_by.to(device)
        tolerance = max(1e-4, *(8 * torch.finfo(m.parameter.dtype).eps for m in host))
        factor, bound = self._treatment(old_N, new_N, tolerance)
        for mark in grafts:
            gradient = mark.parameter.grad
            assert gradient is not None
            near = gradient.device, gradient.dtype
            gradient.mul_(factor.to(*near)).clamp_(-bound.to(*near), bound.to(*near))

    def _treatment(self, old_N: Tensor, new_N: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """The factor and the bound that make ``new_N`` of ``old_N``; 1 and infinity for neither."""
        one, infinity = torch.ones_like(old_N[0]), torch.full_like(old_N[0], torch.inf)
        size = old_N.square().sum()
        usable = (size > 0) & new_N.isfinite().all() & old_N.isfinite().all()
        factor = torch.where(usable, (old_N * new_N).sum() / size, one)
        largest = old_N.abs().max()
        is_scaled = ((new_N - factor * old_N).abs() <= tolerance * factor.abs() * largest).all()
        as_before = (new_N - old_N).abs() <= tolerance * old_N.abs()
        bound = new_N.abs().max()
        at_bound = (new_N.abs() >= bound * (1 - tolerance)) & (old_N.abs() >= bound)
        is_cut = (as_before | (at_bound & (new_N * old_N >= 0))).all() & ~as_before.all()
        self._odd = self._odd if self.unrepeated else copy_to_host(usable & ~is_scaled & ~is_cut)
        # A step in which no value of the host was cut off has the bound of those before it.
        kept = infinity if self._bound is None else self._bound.to(infinity)
        bound = torch.where(is_cut, bound, torch.where(as_before.all(), kept, infinity))
        self._bound = torch.where(is_cut, bound, kept)
        return torch.where(is_scaled & ~is_cut, factor, one), bound


def _has_numbers(gradient: Tensor) -> bool:
    return (
        gradient.layout is torch.strided and gradient.is_floating_point() and gradient.numel() > 0
    )


def _few_indices(gradient: Tensor) -> Tensor:
    """Places of some elements, and of one of the largest."""
    size = gradient.numel()
    spread = torch.arange(0, size, max(1, -(-size // ELEMENTS)), device=gradient.device)
    step = max(1, -(-size // SEARCHED))
    largest = gradient.detach().reshape(-1)[::step].abs().argmax().reshape(1) * step
    return torch.cat([spread, largest])
