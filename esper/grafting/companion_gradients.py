"""What the user's loop does to its optimizer's gradients, so that a graft's go through the same.

A loop clears gradients through its optimizer, which does not know a graft's weights; a
``GradScaler`` divides those of the optimizer that it is given. Nothing of the user's is wrapped or
hooked for that. A hook on each new weight runs as its gradient arrives, before it is accumulated:

cleared    the host's gradients were cleared since the last backward pass: so are the graft's
left out   all of the host optimizer's tensors are frozen for this pass only, as Lightning does with
           the other optimizers of a GAN: the graft's gradient counts as zero
scaled     the graft's gradient is divided by the scaler's scale here, so that clipping over
           ``model.parameters()`` after ``unscale_`` sees true norms
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.grafting.optimizers import parameters_of

WITNESSES = 8  # gradients of the host that are compared


@dataclass(frozen=True, slots=True)
class _Witness:
    """A gradient of the host as it was; it is not kept in memory."""

    parameter: nn.Parameter
    gradient: weakref.ref[Tensor]
    version: int

    def is_replaced(self) -> bool:
        """Another tensor is the gradient now, or none is."""
        gradient = self.parameter.grad
        return gradient is None or self.gradient() is not gradient

    def is_same(self) -> bool:
        """Nothing was written into it."""
        gradient = self.parameter.grad
        return gradient is not None and gradient._version == self.version


class HostGradients:
    """Notices that the gradients of an optimizer were cleared, by whatever call."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._witnesses: list[_Witness] = []
        self._frozen = self._is_frozen()

    @property
    def known(self) -> bool:
        """The host had a gradient at the last :meth:`mark`; else a clearing cannot be noticed."""
        return bool(self._witnesses)

    def mark(self) -> None:
        """Remembers the present gradients."""
        self._witnesses = [
            _Witness(parameter, weakref.ref(gradient), gradient._version)
            for parameter, gradient in self._present()
        ]

    def end_step(self) -> None:
        """The host's optimizer has made a step: what is frozen now was not frozen for one pass."""
        self._frozen = self._is_frozen()
        self.mark()

    def cleared(self) -> bool:
        """The gradients were cleared since :meth:`mark`.

        Some may have been accumulated again in the present backward pass.
        """
        if not self._witnesses:
            return False
        if any(witness.is_replaced() for witness in self._witnesses):
            # With create_graph, accumulation makes a new tensor as well.
            keeps_graph = torch.is_grad_enabled()
            return not keeps_graph or any(w.parameter.grad is None for w in self._witnesses)
        if any(witness.is_same() for witness in self._witnesses):
            return False
        # All were written into: set to zero, or all accumulated in this pass before the graft's.
        smallest = min(self._witnesses, key=lambda witness: witness.parameter.numel())
        gradient = smallest.parameter.grad
        assert gradient is not None
        return not bool(gradient.any())

    def left_out(self) -> bool:
        """All tensors are frozen, and were not when the optimizer made its last step."""
        return self._is_frozen() and not self._frozen

    def _is_frozen(self) -> bool:
        optimizer = self._optimizer()
        held = [] if optimizer is None else parameters_of(optimizer)
        return bool(held) and not any(parameter.requires_grad for parameter in held)

    def _present(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        optimizer = self._optimizer()
        held = [] if optimizer is None else parameters_of(optimizer)
        having = [p for p in held if p.grad is not None and p.grad.layout is torch.strided]
        for parameter in having[:: max(1, -(-len(having) // WITNESSES))]:
            gradient = parameter.grad
            if gradient is not None:
                yield parameter, gradient


class Unscaler:
    """Divides a graft's gradients as a ``GradScaler`` divides those of the host's optimizer."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        self._used = True  # as far as is known, the host's step goes through it
        self._found_inf: dict[torch.device, Tensor] = {}

    def arrived(self, gradient: Tensor) -> Tensor:
        """The gradient divided by the scale; zeros where it is not finite, which skips the step.

        Zeros, because clipping over all parameters would spread an infinite norm to the host. On
        several ranks it stays: the others must learn of it through the averaged gradient.
        """
        scale = self._scale()
        if scale is None:
            return gradient
        unscaled = gradient.clone()
        found = self._found_inf.setdefault(
            gradient.device, torch.zeros((), dtype=torch.float32, device=gradient.device)
        )
        inverse = scale.double().reciprocal().float().to(gradient.device)
        torch._amp_foreach_non_finite_check_and_unscale_([unscaled], found, inverse)
        return unscaled if _ranks() > 1 else unscaled.nan_to_num(0.0, 0.0, 0.0)

    def forget(self) -> None:
        """The gradients were cleared."""
        self._found_inf.clear()

    def allows(self, host: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
        """The host's step that is ending is one that the graft makes too."""
        if not self._scaler.is_enabled():
            return True
        used = self._steps(host)
        if used != self._used:
            self._used = used
            scale = self._scaler._get_scale_async()
            if scale is not None:  # what has arrived was taken for what it is not
                _multiply(parameters, scale.double().reciprocal().float() if used else scale)
        if not used:
            return True
        skipped = getattr(host, "found_inf", None)
        found = [*self._found_inf.values(), *([skipped] if isinstance(skipped, Tensor) else [])]
        gradients = [p.grad for p in parameters if p.grad is not None]
        wrong = [~gradient.isfinite().all() for gradient in gradients] + [f > 0 for f in found]
        return not wrong or not bool(torch.stack([w.to(wrong[0].device) for w in wrong]).any())

    def _scale(self) -> Tensor | None:
        scaled = self._used and self._scaler.is_enabled()
        scale: Tensor | None = self._scaler._get_scale_async() if scaled else None
        return scale

    def _steps(self, host: torch.optim.Optimizer) -> bool:
        """The scaler makes this step: it has looked for infinities, or lets the optimizer look."""
        state = self._scaler._per_optimizer_states.get(id(host))
        return hasattr(host, "found_inf") or bool(state and state["found_inf_per_device"])


def _multiply(parameters: Sequence[nn.Parameter], factor: Tensor) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.device))


def _ranks() -> int:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return int(distributed.get_world_size())
