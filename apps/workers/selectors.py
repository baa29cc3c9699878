"""What each worker builds now."""

from __future__ import annotations

from collections.abc import Sequence

from apps.workers.models import CompileJob, Worker
from esper.contracts import JobState


def current_jobs(workers: Sequence[Worker]) -> dict[str, CompileJob]:
    """The running job of each worker that has one, by the worker's name, with its steps."""
    names = [worker.name for worker in workers]
    running = CompileJob.objects.filter(state=JobState.RUNNING, lease_owner__in=names)
    return {job.lease_owner: job for job in running.prefetch_related("steps")}
