"""One state of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class State:
    """The run after ``step``; tensors on the host for a model on a GPU."""

    step: int
    tensors: dict[str, Tensor]
    moments: dict[int, dict[str, Any]]  # id(parameter) -> its optimizer's state

    def on(self, name: str, like: Tensor) -> Tensor:
        """One tensor, on the device of ``like``."""
        return self.tensors[name].to(like.device)
