"""The pause of a change: what the training loop waits for while the model is changed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Python's cyclic garbage collector waits until the pause is over.

    A snapshot makes many objects, so some pauses would hold a full collection. It visits all
    objects of the process, which takes 0.2 s where torch.compile is loaded: longer than the rest.
    """
    if not gc.isenabled():  # by the script, or by a pause around this one
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
