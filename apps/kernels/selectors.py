"""Who may fetch what, and how good the cache is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db.models import Avg, Count, Q, Sum

from apps.kernels.models import CompileJob, Kernel, Worker
from apps.runs.models import Command
from esper.contracts import JobState


def run_may_fetch(run_uid: str, digest: str) -> bool:
    """A trainer gets the kernels that it was told to graft, and no others."""
    return Command.objects.filter(run__uid=run_uid, kernel_digest=digest).exists()


def current_jobs(workers: Sequence[Worker]) -> dict[str, CompileJob]:
    """The running job of each worker that has one, by the worker's name, with its steps."""
    names = [worker.name for worker in workers]
    running = CompileJob.objects.filter(state=JobState.RUNNING, lease_owner__in=names)
    return {job.lease_owner: job for job in running.prefetch_related("steps")}


def cache_stats() -> dict[str, Any]:
    """The kernel cache in numbers; null where nothing has been built yet."""
    kernels = Kernel.objects.aggregate(count=Count("id"), bytes=Sum("size_bytes"))
    done = CompileJob.objects.filter(state=JobState.DONE).aggregate(
        hits=Count("id", filter=Q(cached=True)),
        misses=Count("id", filter=Q(cached=False)),
        hit_ms=Avg("build_ms", filter=Q(cached=True)),
        miss_ms=Avg("build_ms", filter=Q(cached=False)),
    )
    asked = done["hits"] + done["misses"]
    return {
        "kernels": kernels["count"],
        "bytes": kernels["bytes"] or 0,
        "hits": done["hits"],
        "misses": done["misses"],
        "hit_ratio": done["hits"] / asked if asked else None,
        "mean_cached_ms": done["hit_ms"],
        "mean_cold_ms": done["miss_ms"],
    }
