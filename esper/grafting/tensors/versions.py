"""How often a tensor was written to, as torch counts it."""

from __future__ import annotations

from torch import Tensor


def writes_to(tensor: Tensor) -> int:
    """0 for a tensor that was made in ``torch.inference_mode``, of which torch counts nothing."""
    return 0 if tensor.is_inference() else tensor._version
