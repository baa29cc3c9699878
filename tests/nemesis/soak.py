"""Does anything grow? Memory, open files and database connections, sampled during a campaign."""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from tests.nemesis.installation import Installation

CONNECTIONS = "database connections"
PAGE_MIB = 4096 / 2**20


@dataclass
class Samples:
    """Readings by what was measured, in their order."""

    readings: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def growth(self) -> dict[str, tuple[float, float]]:
        """The median of the second quarter and that of the last one; the first is the warm-up."""
        found = {}
        for name, values in sorted(self.readings.items()):
            quarter = len(values) // 4
            if quarter:
                middle = statistics.median(values[quarter : 2 * quarter])
                found[name] = (middle, statistics.median(values[-quarter:]))
        return found


class Sampler:
    """Samples an installation every ``period`` seconds, in a thread.

    A process that was started again is another one: its readings begin anew.
    """

    def __init__(self, installation: Installation, period: float) -> None:
        self._installation, self._period = installation, period
        self.samples = Samples()
        self._pids: dict[str, int] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._stopping.wait(self._period):
            for name, pid in self._installation.pids().items():
                if self._pids.setdefault(name, pid) != pid:
                    self._pids[name] = pid
                    for what in ("MiB", "files"):
                        self.samples.readings.pop(f"{name}, {what}", None)
                with suppress(OSError):
                    self._take(name, pid)
            with suppress(psycopg.Error):
                query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'client%'"
                [(count,)] = self._installation.rows(query)
                self.samples.readings[CONNECTIONS].append(count)

    def _take(self, name: str, pid: int) -> None:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        self.samples.readings[f"{name}, MiB"].append(pages * PAGE_MIB)
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        self.samples.readings[f"{name}, files"].append(files)


def describe_growth(samples: Samples, seconds: float) -> str:
    """A table with a row for each process."""
    rows = [
        f"| {name} | {early:.0f} | {late:.0f} | {_percent(early, late)} |"
        for name, (early, late) in samples.growth().items()
    ]
    head = f"Sampled for {seconds:.0f} s; medians of the second and of the last quarter."
    return "\n".join([head, "", "| | second | last | growth |", "|---|---|---|---|", *rows])


def _percent(early: float, late: float) -> str:
    return f"{100 * (late - early) / early:+.1f} %" if early else "–"
