"""The builder children of this worker process, and the progress of their job."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from django.conf import settings
from django.db import close_old_connections
from django.utils import timezone

from apps.workers import jobs
from apps.workers.models import CompileJob
from esper.compilation import BuilderPool, BuildLimits
from esper.contracts import JobStep

log = logging.getLogger(__name__)
_pool: BuilderPool | None = None


def builders() -> BuilderPool:
    """The pool of this process, made at first use."""
    global _pool
    if _pool is None:
        limits = BuildLimits(
            seconds=settings.ESPER_BUILD_TIMEOUT_SECONDS,
            memory_mib=settings.ESPER_BUILD_MEMORY_MIB,
        )
        _pool = BuilderPool(limits, size=settings.ESPER_BUILDERS)
    return _pool


def close_builders() -> None:
    """Close all of them; the next job starts new ones."""
    global _pool
    if _pool is not None:
        _pool.close()
    _pool = None


class Progress:
    """The progress of one attempt; a slow build writes its steps at each renewal of the lease.

    ``lost`` is set when the lease was taken away: another worker has the job, or nobody does.
    """

    def __init__(self, job: CompileJob) -> None:
        self._job = job
        self._done: dict[JobStep, datetime] = {}
        self._written = 0
        self._lock = threading.Lock()  # the build notes, the thread that renews the lease writes
        self.lost = threading.Event()

    def note(self, step: JobStep) -> None:
        with self._lock:
            self._done.setdefault(step, timezone.now())

    def write(self) -> None:
        """Write the steps that are done and not written yet."""
        with self._lock:
            steps = dict(list(self._done.items())[self._written :])
            self._written = len(self._done)
        if steps:
            jobs.note_steps(self._job, steps)

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Renew the lease from a thread during the build."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(settings.ESPER_COMPILE_HEARTBEAT_SECONDS):
                try:
                    if not jobs.renew_lease(self._job):
                        self.lost.set()
                    self.write()
                except Exception as error:  # a database that is away now may be back in time
                    log.warning("job %s: lease not renewed: %s", self._job.uid, error)
                close_old_connections()

        thread = threading.Thread(target=renew, name=f"lease-{self._job.uid}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
