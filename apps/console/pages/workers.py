"""Workers with the effects of each act on them, and the jobs: running, waiting, ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from apps.accounts.policy import Act, may
from apps.console.job_rows import (
    JOBS_SHOWN,
    OPEN,
    JobRow,
    StepTime,
    adaptation_numbers,
    ended_jobs,
    step_times,
)
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.recipes.models import Launch
from apps.recipes.services import host_queue
from apps.workers.models import CompileJob, Worker
from apps.workers.selectors import current_jobs
from apps.workers.services import compile_queue
from esper.contracts import LAUNCH_ENDED, JobState, WorkerKind, WorkerMode, WorkerState

_GONE = (WorkerState.STOPPING, WorkerState.OFFLINE)


@page
def workers(request: HttpRequest) -> HttpResponse:
    may_manage = may(person(request), Act.MANAGE_WORKERS)
    panels = [
        Panel(
            "workers",
            _("Compile workers"),
            "console/workers/workers.html",
            lambda: {"rows": compile_workers(), "may_manage": may_manage},
            ("worker", "job"),
            every=5,
        ),
        Panel(
            "queue",
            _("Queue"),
            "console/workers/queue.html",
            lambda: {"queue": queue()},
            ("job",),
            every=5,
        ),
        Panel(
            "jobs",
            _("Ended jobs"),
            "console/jobs/ended.html",
            lambda: {"jobs": ended_jobs()},
            ("job",),
            every=15,
        ),
        Panel(
            "others",
            _("Control workers and Tamiyo"),
            "console/workers/others.html",
            lambda: {"workers": other_workers()},
            ("worker",),
            every=15,
        ),
    ]
    return render_page(
        request,
        "console/simple.html",
        title=_("Workers"),
        panels=panels,
        intro=_("Processes that build and measure kernels, and those that run Esper itself."),
    )


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker, its current job, and sentences that say what an act on it would change.

    ``queues``: each with the number of jobs that wait in it. ``job_drained`` and ``job_refused``
    say what happens to its current job after a drain and after a quarantine.
    """

    worker: Worker
    job: CompileJob | None
    steps: list[StepTime]
    queues: list[tuple[str, int]]
    job_drained: str
    job_refused: str
    others_wait: str
    released: str


def compile_workers() -> list[WorkerRow]:
    """Compile workers; the number of queries does not grow with the number of workers."""
    workers = list(Worker.objects.filter(kind=WorkerKind.COMPILE))
    jobs = current_jobs(workers)
    waiting = _waiting_by_queue()
    launches = _live_launches({worker.host for worker in workers})
    return [_worker_row(worker, workers, jobs, waiting, launches) for worker in workers]


def other_workers() -> list[Worker]:
    """Control workers and Tamiyo: they cannot be drained, so only their last report is shown."""
    return list(Worker.objects.exclude(kind=WorkerKind.COMPILE).order_by("kind", "name"))


def _worker_row(
    worker: Worker,
    workers: list[Worker],
    jobs: dict[str, CompileJob],
    waiting: Counter[str],
    launches: Counter[str],
) -> WorkerRow:
    job = jobs.get(worker.name)
    named = ""
    if job:
        named = _("%(blueprint)s for %(layer)s") % {
            "blueprint": job.blueprint_slug,
            "layer": job.layer.get("name", ""),
        }
    no_job = _("It has no job now.")
    return WorkerRow(
        worker=worker,
        job=job,
        steps=step_times(job) if job else [],
        queues=[(queue, waiting[queue]) for queue in worker.queues],
        job_drained=_("It finishes %(job)s first.") % {"job": named} if job else no_job,
        job_refused=_refused(job, named) if job else no_job,
        others_wait=" ".join(_without(worker, workers, waiting, launches)),
        released=_("It takes jobs again, and its count of builder crashes starts at zero.")
        + _would_take(worker, waiting),
    )


def _refused(job: CompileJob, named: str) -> str:
    left = settings.ESPER_COMPILE_ATTEMPTS - job.attempt
    fate = _("goes back into the queue") if left > 0 else _("fails: it was its last attempt")
    return _("The result of %(job)s is refused, and the job %(fate)s.") % {
        "job": named,
        "fate": fate,
    }


def _without(
    worker: Worker, workers: list[Worker], waiting: Counter[str], launches: Counter[str]
) -> Iterable[str]:
    """For each of its queues: whether another worker serves it, and what waits otherwise."""
    taking = [
        other
        for other in workers
        if other.pk != worker.pk and other.mode == WorkerMode.ACTIVE and other.state not in _GONE
    ]
    served = {queue for other in taking for queue in other.queues}
    own = host_queue(worker.host)
    for queue in worker.queues:
        if queue.startswith("compile."):
            count = waiting[queue]
            if queue in served:
                yield _("%(jobs)s: other workers take it over.") % {"jobs": _jobs(count, queue)}
            else:
                yield _("%(jobs)s: nothing is built for it until this one is released.") % {
                    "jobs": _jobs(count, queue)
                }
        elif queue == own and queue not in served:
            stops = _("No recipe can be started on %(host)s until this worker is released.")
            yield stops % {"host": worker.host} + _unaffected(launches[own])


def _jobs(count: int, queue: str) -> str:
    if not count:
        return _("No job waits in %(queue)s") % {"queue": queue}
    said = ngettext("%(count)s job waits in %(queue)s", "%(count)s jobs wait in %(queue)s", count)
    return said % {"count": count, "queue": queue}


def _unaffected(count: int) -> str:
    if not count:
        return ""
    said = ngettext(
        "%(count)s launch there keeps running.", "%(count)s launches there keep running.", count
    )
    return " " + said % {"count": count}


def _would_take(worker: Worker, waiting: Counter[str]) -> str:
    count = sum(waiting[queue] for queue in worker.queues)
    if not count:
        return ""
    said = ngettext(
        "%(count)s job that it can take waits now.",
        "%(count)s jobs that it can take wait now.",
        count,
    )
    return " " + said % {"count": count}


def _live_launches(hosts: set[str]) -> Counter[str]:
    live = Launch.objects.filter(recipe__host__in=hosts).exclude(state__in=LAUNCH_ENDED)
    return Counter(host_queue(host) for host in live.values_list("recipe__host", flat=True))


def _waiting_by_queue() -> Counter[str]:
    queued = CompileJob.objects.filter(state=JobState.QUEUED)
    return Counter(map(compile_queue, queued.values_list("capability", flat=True)))


@dataclass(frozen=True, slots=True)
class Queue:
    rows: list[JobRow]
    waiting: int
    running: int
    oldest: datetime | None


def queue() -> Queue:
    """Running jobs, then waiting jobs, oldest first."""
    found = CompileJob.objects.filter(state__in=OPEN)
    counts = Counter(found.values_list("state", flat=True))
    # descending, because "running" comes after "queued" in the alphabet
    jobs = list(found.prefetch_related("steps").order_by("-state", "pk")[:JOBS_SHOWN])
    numbers = adaptation_numbers(jobs)
    ahead: Counter[str] = Counter()
    rows = []
    for job in jobs:
        rows.append(
            JobRow(job, numbers.get(job.adaptation_uid), step_times(job), ahead[job.capability])
        )
        ahead[job.capability] += job.state == JobState.QUEUED
    waiting = [job.queued_at for job in jobs if job.state == JobState.QUEUED]
    return Queue(
        rows,
        counts[JobState.QUEUED],
        counts[JobState.RUNNING],
        min(waiting) if waiting else None,
    )
