"""Compile jobs: leases, attempts, results.

A Celery message only says "look at job 17". The lease in the row decides who works on it; the
attempt number is the fence that refuses a worker whose lease has been taken away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F

from apps.notifications.services import SYSTEM_TOPIC, enqueue, publish
from apps.rest.clock import now as database_now
from apps.runs.selectors import project_of
from apps.workers.models import CompileJob, JobStepDone
from apps.workers.modes import may_take_jobs
from apps.workers.queues import compile_queue, served_queues
from esper.contracts import JobState, JobStep

COMPILE_TASK = "adaptations.compile"
LOG_CHARACTERS = 16_000


def queue_job(
    *,
    adaptation_uid: str,
    run_uid: str,
    blueprint_slug: str,
    config: dict[str, Any],
    layer: dict[str, Any],
    capability: str,
) -> CompileJob:
    """Queue the build of a kernel. Call it in the transaction of the adaptation's transition."""
    job = CompileJob.objects.create(
        adaptation_uid=adaptation_uid,
        run_uid=run_uid,
        blueprint_slug=blueprint_slug,
        config=config,
        layer=layer,
        capability=capability,
    )
    note_unserved_jobs([job])
    notify_worker(job)
    return job


def notify_worker(job: CompileJob) -> None:
    """Send the task message that tells the workers of its queue to look at this job."""
    enqueue(task=COMPILE_TASK, queue=compile_queue(job.capability), args=[job.uid])


def note_unserved_jobs(jobs: Sequence[CompileJob] | None = None) -> None:
    """Write into queued jobs why no worker takes them; clear it when one can."""
    queued = CompileJob.objects.filter(state=JobState.QUEUED)
    waiting = list(queued) if jobs is None else jobs
    served = served_queues() if waiting else frozenset()
    for job in waiting:
        has_worker = compile_queue(job.capability) in served
        waits_for = "" if has_worker else f"no running worker compiles for {job.capability}"
        if waits_for != job.waits_for:
            job.waits_for = waits_for
            queued.filter(pk=job.pk).update(waits_for=waits_for)


@transaction.atomic
def claim_job(job: CompileJob, *, worker: str) -> bool:
    """Take the lease; False when it is taken, the job is over, or the worker is not active."""
    if not may_take_jobs(worker):
        return False
    now = database_now()
    claimed = CompileJob.objects.filter(
        pk=job.pk, state=JobState.QUEUED, attempt__lt=settings.ESPER_COMPILE_ATTEMPTS
    ).update(
        state=JobState.RUNNING,
        attempt=F("attempt") + 1,
        lease_owner=worker,
        lease_until=now + timedelta(seconds=settings.ESPER_COMPILE_LEASE_SECONDS),
        started_at=now,
        waits_for="",
    )
    job.refresh_from_db()
    if claimed:
        note_steps(job, {JobStep.CLAIMED: now})
    return bool(claimed)


def note_steps(job: CompileJob, steps: Mapping[JobStep, datetime]) -> None:
    """Record which steps of this attempt are done, and when; repeating it changes nothing."""
    rows = [
        JobStepDone(job_id=job.pk, attempt=job.attempt, step=step, at=at)
        for step, at in steps.items()
    ]
    JobStepDone.objects.bulk_create(rows, ignore_conflicts=True)


def renew_lease(job: CompileJob) -> bool:
    """Extend the lease of this attempt; False when it was taken away."""
    return bool(
        _attempt(job).update(
            lease_until=database_now() + timedelta(seconds=settings.ESPER_COMPILE_LEASE_SECONDS)
        )
    )


def holds_lease(job: CompileJob) -> bool:
    """Is this attempt still the one that counts? Ask under the lock of the run."""
    return bool(_attempt(job).exists())


def finish_job(job: CompileJob, *, kernel_digest: str, cached: bool, build_ms: float) -> bool:
    """Record the result of this attempt; False (and nothing written) for a late one."""
    done = _attempt(job).update(
        state=JobState.DONE,
        kernel_digest=kernel_digest,
        cached=cached,
        build_ms=build_ms,
        lease_until=None,
        ended_at=database_now(),
    )
    if done:
        publish(
            topic=SYSTEM_TOPIC,
            type="job.done",
            data={"job": job.uid, "kernel": kernel_digest, "cached": cached},
            project_id=project_of(job.run_uid),
        )
    return bool(done)


def replace_kernel(*, before: str, digest: str) -> None:
    """A kernel was built again and has another digest now: its jobs name the new one."""
    CompileJob.objects.filter(kernel_digest=before).update(kernel_digest=digest)


def fail_job(job: CompileJob, *, error: str, permanent: bool, log: str = "") -> JobState | None:
    """This attempt failed: queue the job again, or fail it for good. None for a late attempt.

    ``log`` is what the builder wrote last; it is stored with the error of each attempt.
    """
    final = permanent or job.attempt >= settings.ESPER_COMPILE_ATTEMPTS
    state = JobState.FAILED if final else JobState.QUEUED
    changed = _attempt(job).update(
        state=state,
        error=error,
        log=_longer_log(job, error, log),
        lease_until=None,
        lease_owner="",
        ended_at=database_now() if final else None,
    )
    if not changed:
        return None
    if not final:
        job.refresh_from_db()
        note_unserved_jobs([job])
        notify_worker(job)
    publish(
        topic=SYSTEM_TOPIC,
        type=f"job.{state}",
        data={"job": job.uid, "error": error[:300]},
        project_id=project_of(job.run_uid),
    )
    return state


def _longer_log(job: CompileJob, error: str, log: str) -> str:
    entry = f"attempt {job.attempt} on {job.lease_owner}: {error}\n{log}".rstrip()
    earlier = CompileJob.objects.values_list("log", flat=True).get(pk=job.pk)
    return "\n".join(filter(None, (earlier, entry)))[-LOG_CHARACTERS:]


def cancel_job(job: CompileJob) -> bool:
    """Nobody needs the result any more."""
    return bool(
        CompileJob.objects.filter(pk=job.pk, state__in=[JobState.QUEUED, JobState.RUNNING]).update(
            state=JobState.CANCELLED, ended_at=database_now()
        )
    )


def jobs_with_lost_lease() -> list[CompileJob]:
    """Running jobs whose worker has not renewed its lease in time."""
    return list(CompileJob.objects.filter(state=JobState.RUNNING, lease_until__lt=database_now()))


def _attempt(job: CompileJob) -> Any:
    return CompileJob.objects.filter(pk=job.pk, state=JobState.RUNNING, attempt=job.attempt)
