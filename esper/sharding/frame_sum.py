"""The sum of one small vector over the ranks, computed in the background.

It is gloo's own thread that waits for the other ranks, never the training thread: a rank that does
not take part, that raises or that dies cannot block the others here.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, distributed

_LOOK_EVERY_SECONDS = 0.001


class FrameSum:
    """One all-reduce at a time.

    Args:
        group: a gloo group that carries nothing else at the same moment.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._work: Any = None
        self._values: Tensor | None = None

    @property
    def open(self) -> bool:
        """A sum was started, and its result was not taken."""
        return self._work is not None

    def start(self, values: Tensor) -> None:
        """Begins the sum of ``values`` (on the CPU, overwritten) over all ranks."""
        self._values = values
        self._work = distributed.all_reduce(values, group=self._group, async_op=True)

    def take(self, patience_s: float = 0.0) -> Tensor | None:
        """The sum; None while it is not there.

        Args:
            patience_s: how long to wait for it.

        Raises:
            RuntimeError: torch's, when another rank has ended.
        """
        ends = time.monotonic() + patience_s
        while not self._work.is_completed():
            if time.monotonic() >= ends:
                return None
            time.sleep(_LOOK_EVERY_SECONDS)
        work, values = self._work, self._values
        self._work = self._values = None
        work.wait()  # returns at once; raises what the thread met
        return values
