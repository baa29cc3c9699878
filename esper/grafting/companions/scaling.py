"""A graft's gradients under a ``GradScaler``, which knows only those of the user's optimizer.

They are divided by the scale as they arrive, so that clipping over ``model.parameters()`` after
``unscale_`` sees true norms. A step that the scaler skips is none of the graft's either; where only
a graft's gradient is not finite, the graft alone skips the step.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper.by_identity import WeaklyByIdentity

_FRAMES = 12  # between a scaler's step and a hook in it, where schedulers and others wrap the step
_noticed: MutableMapping[torch.optim.Optimizer, Any] = WeaklyByIdentity()


def scaler_of_this_step() -> Any:
    """The ``GradScaler`` that makes the optimizer step which is running; None where none does."""
    code = torch.amp.GradScaler.step.__code__
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        if frame.f_code is code:
            return frame.f_locals["self"]
    return None


def notice_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Remembers the scaler of a step that is running, for a graft that comes later."""
    scaler = scaler_of_this_step()
    if scaler is not None:
        _noticed[optimizer] = scaler


def noticed_scaler(optimizer: torch.optim.Optimizer) -> Any:
    """The ``GradScaler`` that has made a step of the optimizer; None if none was seen."""
    return _noticed.get(optimizer)


class Unscaler:
    """Divides a graft's gradients as a ``GradScaler`` divides those of the host's optimizer.

    Args:
        used: gradients are divided from the first one on; else from the first step that goes
            through the scaler.
    """

    def __init__(self, scaler: Any, *, used: bool = True) -> None:
        self._scaler = scaler
        self._used = used  # as far as is known, the host's step goes through it
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

    def applied_to(self, host: torch.optim.Optimizer) -> Tensor | None:
        """What the scaler has multiplied the host's gradients by in this step; None: nothing."""
        state = self._scaler._per_optimizer_states.get(id(host))
        if not self._scaler.is_enabled() or not state or state["stage"].name == "READY":
            return None
        scale = self._scaler._get_scale_async()
        return None if scale is None else scale.double().reciprocal().float()

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
