"""Workers, the queue with what each job waits for, and kernels with who used them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.core.paginator import Page, Paginator
from django.db.models import QuerySet

from apps.adaptations.models import Adaptation
from apps.kernels.models import CompileJob, Kernel, Worker
from esper.contracts import JobState, WorkerMode, WorkerState

SHOWN = 50
_OPEN = (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker and what it builds now; ``queues`` with how many jobs wait in each."""

    worker: Worker
    job: CompileJob | None
    queues: list[tuple[str, int]]


def workers() -> list[WorkerRow]:
    running = {
        job.lease_owner: job for job in CompileJob.objects.filter(state=JobState.RUNNING)[:SHOWN]
    }
    waiting = _waiting_by_queue()
    return [
        WorkerRow(
            worker,
            running.get(worker.name),
            [(queue, waiting[queue]) for queue in worker.queues],
        )
        for worker in Worker.objects.all()
    ]


def _waiting_by_queue() -> Counter[str]:
    queued = CompileJob.objects.filter(state=JobState.QUEUED)
    return Counter(f"compile.{name}" for name in queued.values_list("capability", flat=True))


@dataclass(frozen=True, slots=True)
class JobRow:
    """``why`` is what a queued job waits for; empty for one that runs or has ended."""

    job: CompileJob
    number: int | None  # of its adaptation
    why: str = ""
    stuck: bool = False  # nobody will take it, as things are


@dataclass(frozen=True, slots=True)
class Queue:
    rows: list[JobRow]
    waiting: int
    running: int
    oldest: datetime | None


def queue() -> Queue:
    """What runs and what waits, oldest first, with the reason."""
    found = CompileJob.objects.filter(state__in=_OPEN)
    counts = Counter(found.values_list("state", flat=True))
    jobs = list(found.order_by("state", "pk")[:SHOWN])
    jobs.sort(key=lambda job: (job.state != JobState.RUNNING, job.pk))
    numbers = _numbers(jobs)
    resting = (WorkerState.STOPPING, WorkerState.OFFLINE)
    alive = list(Worker.objects.filter(mode=WorkerMode.ACTIVE).exclude(state__in=resting))
    ahead: Counter[str] = Counter()
    rows = []
    for job in jobs:
        why, stuck = _why_waiting(job, alive, ahead[job.capability])
        rows.append(JobRow(job, numbers.get(job.adaptation_uid), why, stuck))
        ahead[job.capability] += job.state == JobState.QUEUED
    waiting = [job.queued_at for job in jobs if job.state == JobState.QUEUED]
    return Queue(
        rows,
        counts[JobState.QUEUED],
        counts[JobState.RUNNING],
        min(waiting) if waiting else None,
    )


def _why_waiting(job: CompileJob, alive: list[Worker], ahead: int) -> tuple[str, bool]:
    if job.state != JobState.QUEUED:
        return "", False
    name = f"compile.{job.capability}"
    serving = sum(name in worker.queues for worker in alive)
    if not serving:
        return f"nobody serves {name}: start a worker with that capability", True
    if ahead:
        return f"{ahead} before it in {name}", False
    return f"next in {name}, which {_workers(serving)}", False


def _workers(count: int) -> str:
    return "one worker serves" if count == 1 else f"{count} workers serve"


def ended_jobs() -> list[JobRow]:
    return _rows(CompileJob.objects.exclude(state__in=_OPEN).select_related("kernel"))


def jobs_of(kernel: Kernel) -> list[JobRow]:
    return _rows(CompileJob.objects.filter(kernel=kernel))


def _rows(found: QuerySet[CompileJob]) -> list[JobRow]:
    jobs = list(found[:SHOWN])
    numbers = _numbers(jobs)
    return [JobRow(job, numbers.get(job.adaptation_uid)) for job in jobs]


def _numbers(jobs: list[CompileJob]) -> dict[str, int]:
    uids = [job.adaptation_uid for job in jobs]
    return dict(Adaptation.objects.filter(uid__in=uids).values_list("uid", "pk"))


@dataclass(frozen=True, slots=True)
class KernelFilter:
    blueprint: str = ""
    capability: str = ""
    tier: str = ""


def kernels(chosen: KernelFilter, page: int) -> Page[Kernel]:
    rows = Kernel.objects.all()
    if chosen.blueprint:
        rows = rows.filter(blueprint_slug=chosen.blueprint)
    if chosen.capability:
        rows = rows.filter(capability=chosen.capability)
    if chosen.tier.isascii() and chosen.tier.isdigit():
        rows = rows.filter(tier=int(chosen.tier[:3]))
    return Paginator(rows, SHOWN).get_page(page)


def kernel_choices() -> dict[str, Any]:
    """What there is to filter by."""
    known = Kernel.objects.order_by()
    return {
        "blueprints": sorted(known.values_list("blueprint_slug", flat=True).distinct()),
        "capabilities": sorted(known.values_list("capability", flat=True).distinct()),
        "tiers": sorted(str(tier) for tier in known.values_list("tier", flat=True).distinct()),
    }


def get_kernel(digest: str) -> Kernel | None:
    return Kernel.objects.filter(digest=digest).first()


@dataclass(frozen=True, slots=True)
class StageTime:
    name: str
    ms: float
    share: float  # of the whole build


def stage_times(kernel: Kernel) -> list[StageTime]:
    """Where the time of the build went; empty when it was not noted."""
    times = {name: ms for name, ms in kernel.stage_ms.items() if isinstance(ms, int | float)}
    whole = max(sum(times.values()), kernel.build_ms or 0.0)
    return [StageTime(name, ms, ms / whole if whole else 0.0) for name, ms in times.items()]


def users_of(kernel: Kernel) -> list[Adaptation]:
    jobs = CompileJob.objects.filter(kernel=kernel).order_by("-id")[:SHOWN]
    uids = [job.adaptation_uid for job in jobs]
    return list(Adaptation.objects.filter(uid__in=uids).select_related("run", "blueprint"))
