"""The global random generators: their states, read, restored and compared.

Another thread of the script may draw at the same moment, as one that loads data ahead does. What
is compared here is therefore tried again before it counts as a difference.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TRIES = 5  # a pass takes less than the 5 ms after which another thread gets its turn


@dataclass(frozen=True, slots=True)
class RandomStreams:
    """States of Python's, numpy's, torch's and CUDA's global generators."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def read(cls) -> RandomStreams:
        numpy = sys.modules.get("numpy")  # not in use if it is not loaded
        initialized: Callable[[], bool] = torch.cuda.is_initialized
        cuda = torch.cuda.get_rng_state_all() if initialized() else ()
        return cls(
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(legacy=False),
            torch=torch.get_rng_state(),
            cuda=tuple(cuda),
        )

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))

    def stay_restored(self) -> bool:
        """Whether the streams are as they were here; restores them again where they are not."""
        for _ in range(_TRIES):
            if self.equals(RandomStreams.read()):
                return True
            self.restore()
        return False

    def equals(self, other: RandomStreams) -> bool:
        pairs = zip((self.torch, *self.cuda), (other.torch, *other.cuda), strict=False)
        return (
            self.python == other.python
            and _same_numpy(self.numpy, other.numpy)
            and len(self.cuda) == len(other.cuda)
            and all(torch.equal(mine, theirs) for mine, theirs in pairs)
        )


def draws_nothing(run: Callable[[], object]) -> bool:
    """Whether ``run`` uses no global random stream; calls it until one call used none."""
    for _ in range(_TRIES):
        before = RandomStreams.read()
        run()
        if before.equals(RandomStreams.read()):
            return True
    return False


@contextmanager
def kept_streams() -> Iterator[None]:
    """Restores the global random streams after the block."""
    before = RandomStreams.read()
    try:
        yield
    finally:
        before.restore()


def _same_numpy(mine: Any, theirs: Any) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return _numpy_key(mine) == _numpy_key(theirs)


def _numpy_key(state: dict[str, Any]) -> tuple[Any, ...]:
    """A numpy generator's state as a tuple that compares by value."""
    inner = state["state"]
    return (
        state["bit_generator"],
        *(value.tobytes() if hasattr(value, "tobytes") else value for value in inner.values()),
        state.get("has_gauss"),
        state.get("gauss"),
    )
