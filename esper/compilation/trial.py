"""Compares a compiled graft with the eager one: equal results first, then speed.

Shapes: x is the layer's input, y its output, both at the traced batch size.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esper import grafting
from esper.blueprints import Graft, layout
from esper.compilation.native import CompiledGraft
from esper.contracts import LayerInfo
from esper.exceptions import KernelError
from esper.grafting.slot import first_tensor

MIN_SPEEDUP = 1.05
# Largest allowed difference of any output or gradient, as a share of its largest value. Another
# order of sums changes the last bits; a wrong kernel changes the first.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
ROUNDS = 15
ENOUGH_SECONDS = 2.0
_PAUSE_SECONDS = 0.002  # between rounds, because the training uses the same interpreter

Combine = Callable[[Graft, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Trial:
    """The result.

    Attributes:
        speedup: eager time over compiled time, forward and backward; NaN where not equal.
        max_difference: largest relative difference of outputs and gradients; ``tolerance`` is the
            limit.
        eager_ms, compiled_ms: best of the rounds.
    """

    speedup: float
    max_difference: float
    tolerance: float
    eager_ms: float = math.nan
    compiled_ms: float = math.nan

    @property
    def equal(self) -> bool:
        return self.max_difference <= self.tolerance

    @property
    def faster(self) -> bool:
        return self.equal and self.speedup >= MIN_SPEEDUP

    @property
    def text(self) -> str:
        """One line for a person."""
        if not self.equal:
            return (
                f"compiled code differs by {self.max_difference:.1e} "
                f"(limit {self.tolerance:.0e}), kept eager"
            )
        return f"compiled {self.speedup:.2f}×, {'swapped in' if self.faster else 'kept eager'}"


def try_compiled(graft: Graft, compiled: CompiledGraft, layer: LayerInfo) -> Trial:
    """Compares and times both on a copy of the graft; the graft itself is only read.

    For a thread beside the training: it uses no random stream and no ``.grad``.

    Raises:
        KernelError: the layer's description does not define a stand-in.
    """
    copied = copy.deepcopy(graft)
    _move_off_zero(copied)
    x, y = sample(layer)
    tolerance = TOLERANCES[x.dtype]
    difference = _difference(_run(_eager, copied, x, y), _run(compiled, copied, x, y))
    if not difference <= tolerance:  # NaN is a difference
        return Trial(math.nan, difference, tolerance)
    eager_ms, compiled_ms = _race(copied, compiled, x, y)
    return Trial(eager_ms / compiled_ms, difference, tolerance, eager_ms, compiled_ms)


def sample(layer: LayerInfo) -> tuple[Tensor, Tensor]:
    """Input and output of a stand-in for the layer, at its shapes; both require gradients.

    Raises:
        KernelError: the layer does not take real numbers, or its shapes cannot be reproduced.
    """
    host, x = grafting.stand_in(layer)
    x = _with_rows(x, layer.in_shape[0])
    arguments = (x, x, x) if layer.kind in layout.ATTENTION else (x,)
    with torch.no_grad():
        y = first_tensor(host(*arguments))
    if y is None or not x.is_floating_point():
        raise KernelError(f"{layer.kind} does not take real numbers")
    if (tuple(x.shape), tuple(y.shape)) != (layer.in_shape, layer.out_shape):
        raise KernelError(f"{layer.name} is called with shapes that a stand-in cannot reproduce")
    return x.contiguous().requires_grad_(), y.detach().contiguous().requires_grad_()


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    missing = -(-rows // len(tensor))
    return tensor.detach().repeat(missing, *[1] * (tensor.dim() - 1))[:rows]


def _move_off_zero(graft: Graft) -> None:
    """A new graft has a zero factor, which would hide errors of the other factors."""
    device = next((parameter.device for parameter in graft.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in graft.parameters():
            noise = torch.randn(
                parameter.shape, generator=generator, device=device, dtype=torch.float32
            )
            parameter.add_(noise.to(parameter.dtype), alpha=0.02)
        if graft.alpha is not None:
            graft.alpha.fill_(0.5)


def _eager(graft: Graft, x: Tensor, y: Tensor) -> Tensor:
    return graft(x, y)  # type: ignore[no-any-return]


def _run(combine: Combine, graft: Graft, x: Tensor, y: Tensor) -> list[Tensor]:
    """Output and gradients of x, y and every parameter."""
    inputs = [x, y, *(p for p in graft.parameters() if p.requires_grad)]
    with torch.enable_grad():
        out = combine(graft, x, y)
        loss = out.float().square().mean()
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [out.detach(), *gradients]


def _difference(eager: list[Tensor], compiled: list[Tensor]) -> float:
    if len(eager) != len(compiled):
        return math.inf
    return max(map(_relative, eager, compiled), default=math.inf)


def _relative(eager: Tensor, compiled: Tensor) -> float:
    if eager.shape != compiled.shape or eager.dtype != compiled.dtype:
        return math.inf
    if not eager.numel():
        return 0.0
    gap = float((eager.double() - compiled.double()).abs().max())
    scale = float(eager.double().abs().max())
    if not math.isfinite(gap):
        return math.inf
    return gap / scale if scale else gap


def _race(graft: Graft, compiled: CompiledGraft, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Best milliseconds of both, measured in turns, so that other load affects both equally."""
    eager: list[float] = []
    fast: list[float] = []
    until = time.monotonic() + ENOUGH_SECONDS
    while len(fast) < 3 or (len(fast) < ROUNDS and time.monotonic() < until):
        eager.append(_time(_eager, graft, x, y))
        fast.append(_time(compiled, graft, x, y))
        time.sleep(_PAUSE_SECONDS)
    return min(eager[1:]), min(fast[1:])


def _time(combine: Combine, graft: Graft, x: Tensor, y: Tensor) -> float:
    _synchronise(x)
    started = time.perf_counter()
    out = combine(graft, x, y)
    inputs = [x, y, *(p for p in graft.parameters() if p.requires_grad)]
    torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)
    _synchronise(x)
    return (time.perf_counter() - started) * 1e3


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
