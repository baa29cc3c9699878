"""A hook of Esper, as copies, pickle and the compiler meet it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


class PassingHook:
    """A hook that copies and pickle leave behind, and that compiled code does not contain.

    A copy gets one that does nothing. It is a function of the standard library, so that a pickled
    model loads without Esper. While torch.compile traces, the hook does nothing either: it is no
    part of the graph, and splits none.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return None if torch.compiler.is_compiling() else self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def is_left_behind(hook: Any) -> bool:
    """What a copy has in the place of a :class:`PassingHook`."""
    return isinstance(getattr(getattr(hook, "hook", hook), "__self__", None), nullcontext)
