"""Compile jobs as rows with the time that each step took, for workers and kernels."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from django.db.models import QuerySet

from apps.adaptations.models import Adaptation
from apps.kernels.models import Kernel
from apps.workers.models import CompileJob, JobStepDone
from esper.contracts import JobState, JobStep

JOBS_SHOWN = 50
OPEN = (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step of an attempt and the time since the step before; ``now`` marks the current one."""

    name: str
    at: datetime | None = None
    took_ms: float | None = None

    @property
    def now(self) -> bool:
        return self.at is None


def step_times(job: CompileJob) -> list[StepTime]:
    """The steps of the job's last attempt. Prefetch ``steps`` with the job."""
    done = [step for step in job.steps.all() if step.attempt == job.attempt]
    rows = [
        StepTime(step.step, step.at, _ms_between(before, step))
        for before, step in zip([None, *done], done, strict=False)
    ]
    if job.state == JobState.RUNNING:
        rows += [StepTime(step) for step in _step_after(done)]
    return rows


def _ms_between(before: JobStepDone | None, step: JobStepDone) -> float | None:
    return (step.at - before.at).total_seconds() * 1e3 if before else None


def _step_after(done: list[JobStepDone]) -> list[str]:
    """The name of the current step; empty when all steps are done."""
    names = list(JobStep)
    following = names[names.index(JobStep(done[-1].step)) + 1 :] if done else names
    return [str(name) for name in following[:1]]


@dataclass(frozen=True, slots=True)
class JobRow:
    """``ahead``: how many jobs for the same capability are ahead of it in the queue."""

    job: CompileJob
    number: int | None  # of its adaptation
    steps: list[StepTime]
    ahead: int = 0


def ended_jobs() -> list[JobRow]:
    return job_rows(CompileJob.objects.exclude(state__in=OPEN))


def jobs_of(kernel: Kernel) -> list[JobRow]:
    return job_rows(CompileJob.objects.filter(kernel_digest=kernel.digest))


def job_rows(found: QuerySet[CompileJob]) -> list[JobRow]:
    jobs = list(found.prefetch_related("steps")[:JOBS_SHOWN])
    numbers = adaptation_numbers(jobs)
    return [JobRow(job, numbers.get(job.adaptation_uid), step_times(job)) for job in jobs]


def adaptation_numbers(jobs: list[CompileJob]) -> dict[str, int]:
    uids = [job.adaptation_uid for job in jobs]
    return dict(Adaptation.objects.filter(uid__in=uids).values_list("uid", "pk"))
