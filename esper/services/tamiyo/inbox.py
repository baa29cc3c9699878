"""Stream entries that were read and not yet acted on, by run. They stay unacknowledged."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from esper.services.tamiyo.stream import HealthEntry

MAX_BACKOFF_SECONDS = 10.0


def backoff_seconds(attempts: int) -> float:
    """0.2 s, doubled with every failure up to 10 s, with jitter so that retries spread out."""
    ceiling: float = min(MAX_BACKOFF_SECONDS, 0.2 * 2 ** min(attempts, 10))
    return ceiling * random.uniform(0.5, 1.0)


@dataclass(slots=True)
class _Waiting:
    entries: dict[tuple[bytes, int], HealthEntry] = field(default_factory=dict)  # id, step
    attempts: int = 0
    retry_at: float = 0.0


class Inbox:
    """Entries by run: a failure of one run delays that run only."""

    def __init__(self) -> None:
        self._runs: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, entries: Iterable[HealthEntry]) -> None:
        for entry in entries:
            waiting = self._runs.setdefault(entry.run, _Waiting())
            waiting.entries[entry.id, entry.step] = entry

    def due(self, now: float) -> list[tuple[str, list[HealthEntry]]]:
        return [
            (run, list(waiting.entries.values()))
            for run, waiting in self._runs.items()
            if waiting.retry_at <= now
        ]

    def done(self, run: str) -> None:
        self._runs.pop(run, None)

    def failed(self, run: str, now: float, retry_after: float | None) -> list[HealthEntry]:
        """Try again later.

        Returns:
            Entries that a newer one replaces; the newest one stays unacknowledged.
        """
        waiting = self._runs[run]
        pause = backoff_seconds(waiting.attempts) if retry_after is None else retry_after
        waiting.attempts += 1
        waiting.retry_at = now + pause
        newest = max(waiting.entries.values(), key=lambda entry: (entry.epoch, entry.step))
        replaced = [entry for entry in waiting.entries.values() if entry.id != newest.id]
        waiting.entries = {(newest.id, newest.step): newest}
        return replaced
