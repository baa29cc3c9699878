"""The trainer's own guard: it detects a diverging loss without the server."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esper.contracts import ViolationRule
from esper.health.transfers import HostTransfer, is_late
from esper.sharding import local


@dataclass(frozen=True, slots=True)
class GuardVerdict:
    """Why the guard acts: ``observed`` may be non-finite; ``limit`` is NaN for such a loss."""

    rule: ViolationRule
    observed: float
    limit: float
    text: str


class LossGuard:
    """Distinguishes a blow-up from noise.

    A non-finite loss triggers at once. A finite loss triggers when it is above both
    ``mean + sigmas · std`` and ``factor`` times the mean of the last ``window`` good losses,
    ``patience`` times in a row. Losses above the limit do not enter the window, because they would
    raise the limit.
    """

    def __init__(
        self, window: int = 20, sigmas: float = 6.0, factor: float = 3.0, patience: int = 3
    ) -> None:
        self._good: deque[float] = deque(maxlen=window)
        self._enough = max(2, window // 2)  # fewer losses give no limit
        self._sigmas = sigmas
        self._factor = factor
        self._patience = patience
        self._running = 0

    def observe(self, loss: float) -> GuardVerdict | None:
        """Takes the training loss of each step; returns a verdict when the guard must act."""
        if not math.isfinite(loss):
            return GuardVerdict(ViolationRule.NON_FINITE, loss, math.nan, f"the loss became {loss}")
        limit = math.inf if self._is_usual(loss) else self._limit()
        if loss <= limit:
            self._good.append(loss)
            self._running = 0
            return None
        self._running += 1
        if self._running < self._patience:
            return None
        self._running = 0
        return GuardVerdict(
            ViolationRule.LOSS_BLOW_UP,
            loss,
            limit,
            f"the loss was above {limit:.4g} {self._patience} times in a row, now {loss:.4g}",
        )

    @property
    def calm(self) -> bool:
        """The latest loss was within the limit."""
        return not self._running

    def reset(self) -> None:
        """Discards all losses, after a rollback."""
        self._good.clear()
        self._running = 0

    def state_dict(self) -> dict[str, Any]:
        """The losses so far, for a run that continues in another process."""
        return {"good": list(self._good), "running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._good = deque(map(float, state["good"]), maxlen=self._good.maxlen)
        self._running = int(state["running"])

    def _is_usual(self, loss: float) -> bool:
        """Not above the highest good loss, so below the limit; most steps end here.

        No value of n is further than sqrt(n - 1) standard deviations above their mean.
        """
        is_short = len(self._good) <= 1.0 + self._sigmas**2
        return is_short and bool(self._good) and loss <= max(self._good)

    def _limit(self) -> float:
        if len(self._good) < self._enough:
            return math.inf
        # In each step: neither statistics.pstdev nor fsum, which are 30 and 3 times slower.
        mean = sum(self._good) / len(self._good)
        variance = sum([(loss - mean) ** 2 for loss in self._good]) / len(self._good)
        spread = mean + self._sigmas * math.sqrt(variance)
        # "factor times the mean" for a loss that may be negative: the same distance above it.
        return max(spread, mean + (self._factor - 1.0) * abs(mean))


def gradient_values(parameter: nn.Parameter) -> Tensor | None:
    """The numbers of a gradient: of a sparse one, those that it holds. None: it has no numbers."""
    gradient = None if parameter.grad is None else local(parameter.grad)
    if gradient is None or gradient.is_meta:
        return None
    if gradient.layout is torch.sparse_coo:
        # Not coalesced, which would cost a sort: a sum of finite values may overflow, and the
        # optimizer's next loss shows that.
        gradient = gradient._values()
    if gradient.layout is not torch.strided or not gradient.numel():
        return None
    return gradient


def non_finite_gradients(model: nn.Module) -> tuple[str, ...]:
    """Names of parameters whose gradient has NaN or infinity; waits for the devices once."""
    flags = _Peaks.of(model)
    return () if flags is None else flags.non_finite()


def weights_are_finite(model: nn.Module, names: Iterable[str]) -> bool:
    """Waits for the devices."""
    return all(bool(local(model.get_parameter(name).detach()).isfinite().all()) for name in names)


class GradientGuard:
    """Looks for gradients that are not finite; on a GPU the answer comes with the next call."""

    def __init__(self) -> None:
        self._late: _Peaks | None = None

    def look(self, model: nn.Module) -> tuple[str, ...]:
        """Names of parameters whose gradient has NaN or infinity."""
        late, now = self._late, _Peaks.of(model)
        self._late = now if now is not None and now.transfer.is_late else None
        found = () if late is None else late.non_finite()
        return found if found or now is None or self._late is not None else now.non_finite()

    def forget(self) -> None:
        """The gradients of the last call do not count any more."""
        self._late = None


@dataclass(frozen=True, slots=True)
class _Peaks:
    """A norm of each gradient, on its way to the host; not finite where the gradient is not."""

    names: tuple[str, ...]
    transfer: HostTransfer

    @classmethod
    def of(cls, model: nn.Module) -> _Peaks | None:
        """None where there is no gradient."""
        named = [
            (name, values)
            for name, parameter in model.named_parameters()
            if (values := gradient_values(parameter)) is not None
        ]
        if not named:
            return None
        transfer = HostTransfer()
        transfer.add("peak", _norms([values for _, values in named]))
        transfer.start()
        return cls(tuple(name for name, _ in named), transfer)

    def non_finite(self) -> tuple[str, ...]:
        finite_P = np.isfinite(self.transfer.take("peak"))
        return tuple(name for name, fine in zip(self.names, finite_P, strict=True) if not fine)


def _norms(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The largest absolute values; where a cheaper norm shows that all is finite, that norm.

    On a CPU the largest value takes 15 times as long as the L2 norm. That one may overflow where
    all values are finite, so where it is infinite, it decides nothing.
    """
    found = list(gradients)
    if all(gradient.device.type == "cpu" and not is_late(gradient) for gradient in found):
        norms = torch._foreach_norm(found)
        if bool(torch.stack(norms).isfinite().all()):
            return norms
    return torch._foreach_norm(found, math.inf)
