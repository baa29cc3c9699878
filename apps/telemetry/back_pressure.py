"""Runs whose telemetry is slow to store have to pause, so that approvals do not wait for them.

The pause is asked for in the answer, and enforced: a trainer that does not keep it gets 429 before
its body is read. The count is of this process, as is the time that it is short of.
"""

from __future__ import annotations

import math
from time import monotonic

SLOW_WRITE_MS = 250.0
# With n runs at once each pauses n times as long as it wrote, so that all together get about half
# of the time of the process.
BUSY_FOR_SECONDS = 2.0
PAUSE_MAX_MS = 5000
RUNS_MAX = 10_000

_last_batch: dict[str, float] = {}  # run -> when its last batch was stored
_quiet_until: dict[str, float] = {}


def pause_after(run_uid: str, *, elapsed_ms: float) -> int:
    """The pause in ms after a batch that took ``elapsed_ms`` to store; from now on it is kept."""
    now = monotonic()
    for known in (_last_batch, _quiet_until):
        if len(known) > RUNS_MAX:
            known.clear()
    _last_batch[run_uid] = now
    if elapsed_ms <= SLOW_WRITE_MS:
        return 0
    writing = sum(1 for at in _last_batch.values() if now - at < BUSY_FOR_SECONDS)
    pause_ms = min(int(elapsed_ms * writing), PAUSE_MAX_MS)
    _quiet_until[run_uid] = now + pause_ms / 1000
    return pause_ms


def seconds_to_pause(run_uid: str) -> float:
    """How long the run still has to pause; 0: it may send."""
    left = _quiet_until.get(run_uid, -math.inf) - monotonic()
    if left <= 0.0:
        _quiet_until.pop(run_uid, None)
        return 0.0
    return left


def forget() -> None:
    """For tests, each of which starts without pauses."""
    _last_batch.clear()
    _quiet_until.clear()
