"""Keys and values in eight bits: one scale a head and position, by the largest magnitude.

Shape legend: N all axes but the last, D width of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper.blueprints.base import Graft

LEVELS = 127  # on either side of zero; -128 is not used


def quantise(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Eight-bit codes and the magnitude that code 127 stands for.

    Returns:
        int8 [N, D], and [N, 1] in the dtype of ``x_ND``: the peak is one of the values, so
        it is exact.
    """
    codes, peaks = _codes(x_ND)
    return codes.to(torch.int8), peaks


def restore(codes_ND: Tensor, peaks_N1: Tensor) -> Tensor:
    """The values of the codes, in the dtype of the peaks.

    Quantising them again gives the same codes and peaks in every dtype: after rounding, a code's
    value is off by less than half a level, and 127 / 127 of the peak is the peak.
    """
    wide = torch.promote_types(peaks_N1.dtype, torch.float32)
    return (codes_ND.to(wide) / LEVELS * peaks_N1.to(wide)).to(peaks_N1.dtype)


def rounded(x_ND: Tensor) -> Tensor:
    """``restore(*quantise(x))``, except that NaN stays NaN."""
    return restore(*_codes(x_ND))


def _codes(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    peaks_N1 = x_ND.abs().amax(dim=-1, keepdim=True)
    shares = x_ND.to(wide) / peaks_N1.to(wide)
    return torch.where(peaks_N1 == 0, 0.0, shares * LEVELS).round(), peaks_N1


class _StraightThrough(torch.autograd.Function):
    """Forward: the replacement. Backward: the gradient of ``y``. Keeps nothing for backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, replacement: Tensor) -> Tensor:
        return replacement

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


_straight_through: Callable[[Tensor, Tensor], Tensor] = _StraightThrough.apply


class RoundedKeyValue(Graft):
    """``(1 - α) y + α · rounded(y)`` for the channels that a cache keeps; the others are ``y``.

    The gradient passes unchanged, because rounding has no gradient.

    Args:
        head_width: channels that share one scale.
        cached_channels: (first, end) of the keys and values among the layer's outputs.
    """

    alpha: Tensor

    def __init__(
        self,
        *,
        head_width: int,
        cached_channels: tuple[int, ...],
        ramp_steps: int,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.alpha = torch.zeros((), dtype=torch.float32, device=device)
        self.head_width = head_width
        self.first, self.end = cached_channels
        self.ramp_steps = ramp_steps

    @torch.no_grad()
    def on_step(self) -> None:
        # In place and on the device: no synchronisation, and compiled code sees no new number.
        self.alpha.add_(1.0 / self.ramp_steps).clamp_(max=1.0)

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return _straight_through(y, self._mixed(y.detach()))

    @torch.no_grad()
    def _mixed(self, y: Tensor) -> Tensor:
        kept = y[..., self.first : self.end]
        wide = torch.promote_types(y.dtype, torch.float32)
        target = rounded(kept.reshape(*kept.shape[:-1], -1, self.head_width)).flatten(-2)
        # lerp is exact at both ends: y at 0, the rounded value at 1.
        mixed = torch.lerp(kept.to(wide), target.to(wide), self.alpha.to(wide)).to(y.dtype)
        before, after = y[..., : self.first], y[..., self.end :]
        return torch.cat([before, mixed, after], dim=-1)
