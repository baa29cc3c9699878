"""Sends what happens to the trackers, from a thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from weakref import WeakMethod

from esper.sdk.tracking.events import Event, Progress, ProgressTracker, Tracker

logger = logging.getLogger("esper")

MAX_WAITING = 1000  # events; what comes when so many wait is dropped
MAX_FAILURES = 3
REPORT_SECONDS = 10.0


class Mirror:
    """Sends events to trackers from a thread that begins with the first one.

    Args:
        seconds: between two reports of the progress.
    """

    def __init__(self, trackers: Iterable[Tracker] = (), seconds: float = REPORT_SECONDS) -> None:
        self._failures = dict.fromkeys(trackers, 0)
        self._waiting: queue.Queue[Event | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._progress: WeakMethod[Callable[[], Progress]] | None = None
        self._seconds = seconds
        self._report_at = time.monotonic()
        self.dropped = 0

    def follow(self, progress: Callable[[], Progress]) -> None:
        """Tell the progress, too, to the trackers that take it.

        Args:
            progress: a method, called in the thread; its object is not kept alive by it.
        """
        if any(isinstance(tracker, ProgressTracker) for tracker in self._failures):
            self._progress = WeakMethod(progress)
            self._begin()

    def send(self, event: Event) -> None:
        """Queue an event; never waits and never raises."""
        if not self._failures:
            return
        self._begin()
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, and close the trackers; for ``timeout`` seconds at most."""
        if self._thread is None:
            return
        try:
            self._waiting.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)
        self._thread = None

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="esper-trackers", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (event := self._next()) is not None:
            for tracker in list(self._failures):
                self._try(tracker, lambda: tracker.write(event))  # noqa: B023 (called at once)
        self._report()
        for tracker in list(self._failures):
            self._try(tracker, tracker.close)

    def _next(self) -> Event | None:
        """The next event, None at the end; until it comes, the progress is told when it is due."""
        while self._progress is not None:
            if time.monotonic() >= self._report_at:
                self._report()
                self._report_at = time.monotonic() + self._seconds
            try:
                return self._waiting.get(timeout=max(0.0, self._report_at - time.monotonic()))
            except queue.Empty:
                continue
        return self._waiting.get()

    def _report(self) -> None:
        method = self._progress() if self._progress is not None else None
        if method is None:  # the run was dropped without being closed
            self._progress = None
            return
        progress = method()
        for tracker in list(self._failures):
            if isinstance(tracker, ProgressTracker):
                reporter = tracker
                self._try(tracker, lambda: reporter.report(progress))  # noqa: B023 (called at once)

    def _try(self, tracker: Tracker, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._failures[tracker] += 1
            if self._failures[tracker] >= MAX_FAILURES:
                del self._failures[tracker]
                name = type(tracker).__name__
                logger.warning("no more events are mirrored into %s: %s", name, error)
