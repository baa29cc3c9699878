"""Notices that this worker gets no messages any more although jobs wait for it.

Celery's consumer can stop taking messages after its broker was lost (celery/celery issues 8030,
9054). The process lives on and reports, so nothing else would notice. A new process helps.
"""

from __future__ import annotations

from collections.abc import Collection

from django.conf import settings

from apps.workers.models import CompileJob, Worker
from apps.workers.queues import compile_queue
from esper.contracts import JobState, WorkerMode

# The message of a waiting job is sent again every 10 s, and the job fails after 120 s.
STALLED_SECONDS = 60.0


class WaitingJobs:
    """The jobs that have waited at each look in a row while this worker did nothing."""

    def __init__(self) -> None:
        self._looks: dict[tuple[str, int], int] = {}

    def stalled(self, name: str, queues: Collection[str]) -> str:
        """Look once, at each heartbeat: the job that has waited for too long, or nothing.

        Args:
            name: of this worker.
            queues: that it consumes.
        """
        waiting = self._waiting(name, queues)
        self._looks = {job: self._looks.get(job, 0) + 1 for job in waiting}
        most = STALLED_SECONDS / settings.ESPER_WORKER_HEARTBEAT_SECONDS
        return next((uid for (uid, _), looks in self._looks.items() if looks > most), "")

    def _waiting(self, name: str, queues: Collection[str]) -> list[tuple[str, int]]:
        """(job, attempt). None while this worker builds, or its first builder is not ready."""
        ready = Worker.objects.filter(name=name, mode=WorkerMode.ACTIVE).exclude(devices=[])
        if not ready.exists() or CompileJob.objects.filter(
            state=JobState.RUNNING, lease_owner=name
        ):
            return []
        queued = CompileJob.objects.filter(state=JobState.QUEUED)
        return [
            (job.uid, job.attempt)
            for job in queued.only("uid", "attempt", "capability")
            if compile_queue(job.capability) in queues
        ]
