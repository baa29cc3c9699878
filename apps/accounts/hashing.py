"""Password hashing that leaves the processor to others.

One hash of Django's Argon2 hasher fills eight threads and 100 MiB. Twenty people who sign in at
once delayed every page by seconds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from django.contrib.auth.hashers import Argon2PasswordHasher


class OneThreadArgon2PasswordHasher(Argon2PasswordHasher):
    """OWASP's parameters (Password Storage Cheat Sheet): 19 MiB, two passes, one thread."""

    time_cost = 2
    memory_cost = 19 * 1024  # KiB
    parallelism = 1


AT_ONCE = max(1, (os.cpu_count() or 1) // 2)
WAITING_MAX = 20
WAIT_SECONDS = 10.0
_turns = threading.BoundedSemaphore(AT_ONCE)
_places = threading.BoundedSemaphore(AT_ONCE + WAITING_MAX)


class TooManyAtOnceError(Exception):
    """So many people are signing in that this one would wait for too long."""


@contextmanager
def hashing_turn() -> Iterator[None]:
    """Waits until a password may be hashed; at most half of the processors hash at a time.

    Raises:
        TooManyAtOnceError: the queue is full, or the turn did not come in time.
    """
    if not _places.acquire(blocking=False):
        raise TooManyAtOnceError
    try:
        if not _turns.acquire(timeout=WAIT_SECONDS):
            raise TooManyAtOnceError
        try:
            yield
        finally:
            _turns.release()
    finally:
        _places.release()
