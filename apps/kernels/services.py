"""Jobs with leases and fences, workers with heartbeats, and the rows of stored kernels.

A Celery message only says "look at job 17". Who works on it is decided by the lease in the row; the
attempt number is the fence that refuses a worker which wakes up late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from apps.kernels.models import CompileJob, JobStepDone, Kernel
from apps.kernels.workers import (
    Presence,
    heartbeat,
    is_quarantined,
    mark_offline_workers,
    may_take_jobs,
    note_good_build,
    note_lost_builder,
    queue_is_served,
    say_goodbye,
    served_queues,
    set_worker_mode,
)
from apps.notifications.services import SYSTEM_TOPIC, enqueue, publish
from esper.contracts import JobState, JobStep, KernelBundle, KernelKey, KernelReport

__all__ = [
    "Presence",
    "cancel_job",
    "claim_job",
    "fail_job",
    "finish_job",
    "finite_or_none",
    "heartbeat",
    "holds_lease",
    "is_quarantined",
    "jobs_with_lost_lease",
    "mark_offline_workers",
    "may_take_jobs",
    "note_good_build",
    "note_lost_builder",
    "note_steps",
    "note_unserved_jobs",
    "queue_is_served",
    "queue_job",
    "renew_lease",
    "ring_worker",
    "say_goodbye",
    "served_queues",
    "set_worker_mode",
    "store_kernel",
]

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
    """Ask for a kernel. Call it in the transaction of the adaptation's transition."""
    job = CompileJob.objects.create(
        adaptation_uid=adaptation_uid,
        run_uid=run_uid,
        blueprint_slug=blueprint_slug,
        config=config,
        layer=layer,
        capability=capability,
    )
    note_unserved_jobs([job])
    ring_worker(job)
    return job


def compile_queue(capability: str) -> str:
    """The queue of the workers that compile for it."""
    return f"compile.{capability}"


def ring_worker(job: CompileJob) -> None:
    enqueue(task=COMPILE_TASK, queue=compile_queue(job.capability), args=[job.uid])


def note_unserved_jobs(jobs: Sequence[CompileJob] | None = None) -> None:
    """Write into queued jobs why nobody takes them, and take it out when somebody can."""
    queued = CompileJob.objects.filter(state=JobState.QUEUED)
    waiting = list(queued) if jobs is None else jobs
    served = served_queues() if waiting else frozenset()
    for job in waiting:
        has_worker = compile_queue(job.capability) in served
        waits_for = "" if has_worker else f"no living worker compiles for {job.capability}"
        if waits_for != job.waits_for:
            job.waits_for = waits_for
            queued.filter(pk=job.pk).update(waits_for=waits_for)


@transaction.atomic
def claim_job(job: CompileJob, *, worker: str) -> bool:
    """Take the lease; False when somebody else has it, the job is over, or this worker rests."""
    if not may_take_jobs(worker):
        return False
    now = timezone.now()
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
    """Write what of this attempt is done, and when it was; twice does no harm."""
    rows = [
        JobStepDone(job_id=job.pk, attempt=job.attempt, step=step, at=at)
        for step, at in steps.items()
    ]
    JobStepDone.objects.bulk_create(rows, ignore_conflicts=True)


def renew_lease(job: CompileJob) -> bool:
    """Extend the lease of this attempt; False when it was taken away."""
    return bool(
        _attempt(job).update(
            lease_until=timezone.now() + timedelta(seconds=settings.ESPER_COMPILE_LEASE_SECONDS)
        )
    )


def holds_lease(job: CompileJob) -> bool:
    """Is this attempt still the one that counts? Ask under the lock of the run."""
    return bool(_attempt(job).exists())


def finish_job(job: CompileJob, *, kernel: Kernel, cached: bool, build_ms: float) -> bool:
    """The result of this attempt; False (and nothing written) for a late one."""
    done = _attempt(job).update(
        state=JobState.DONE,
        kernel=kernel,
        cached=cached,
        build_ms=build_ms,
        lease_until=None,
        ended_at=timezone.now(),
    )
    if done:
        Kernel.objects.filter(pk=kernel.pk).update(uses=F("uses") + 1, last_used_at=timezone.now())
        publish(
            topic=SYSTEM_TOPIC,
            type="job.done",
            data={"job": job.uid, "kernel": kernel.digest, "cached": cached},
        )
    return bool(done)


def fail_job(job: CompileJob, *, error: str, permanent: bool, log: str = "") -> JobState | None:
    """This attempt failed: queued again, or failed for good. None for a late attempt.

    ``log`` is what the builder wrote last; it is kept with the error, attempt by attempt.
    """
    final = permanent or job.attempt >= settings.ESPER_COMPILE_ATTEMPTS
    state = JobState.FAILED if final else JobState.QUEUED
    changed = _attempt(job).update(
        state=state,
        error=error,
        log=_longer_log(job, error, log),
        lease_until=None,
        lease_owner="",
        ended_at=timezone.now() if final else None,
    )
    if not changed:
        return None
    if not final:
        job.refresh_from_db()
        note_unserved_jobs([job])
        ring_worker(job)
    publish(topic=SYSTEM_TOPIC, type=f"job.{state}", data={"job": job.uid, "error": error[:300]})
    return state


def _longer_log(job: CompileJob, error: str, log: str) -> str:
    entry = f"attempt {job.attempt} on {job.lease_owner}: {error}\n{log}".rstrip()
    earlier = CompileJob.objects.values_list("log", flat=True).get(pk=job.pk)
    return "\n".join(filter(None, (earlier, entry)))[-LOG_CHARACTERS:]


def cancel_job(job: CompileJob) -> bool:
    """Nobody needs the result any more."""
    return bool(
        CompileJob.objects.filter(pk=job.pk, state__in=[JobState.QUEUED, JobState.RUNNING]).update(
            state=JobState.CANCELLED, ended_at=timezone.now()
        )
    )


def jobs_with_lost_lease() -> list[CompileJob]:
    """Running jobs whose worker was not heard of in time."""
    return list(CompileJob.objects.filter(state=JobState.RUNNING, lease_until__lt=timezone.now()))


def _attempt(job: CompileJob) -> Any:
    return CompileJob.objects.filter(pk=job.pk, state=JobState.RUNNING, attempt=job.attempt)


@transaction.atomic
def store_kernel(
    *, bundle: KernelBundle, key: KernelKey, report: KernelReport, worker: str, build_ms: float
) -> Kernel:
    """The row of a bundle that lies in the store. Two workers may build one key: one row stays."""
    certificate = report.certificate
    kernel, _ = Kernel.objects.update_or_create(
        key_hash=key.hash,
        defaults={
            "digest": bundle.digest,
            "blueprint_slug": key.blueprint,
            "config": key.config,
            "layer_kind": key.layer_kind,
            "in_shape": list(key.in_shape),
            "dtype": key.dtype,
            "capability": key.capability,
            "device_name": key.device_name,
            "tier": report.tier,
            "parameters": certificate.parameters,
            "latency_ms": finite_or_none(certificate.latency_ms),
            "memory_mib": finite_or_none(certificate.memory_mib),
            "forecast_latency_ms": finite_or_none(report.forecast.latency_ms),
            "forecast_memory_mib": finite_or_none(report.forecast.memory_mib),
            **{name: finite_or_none(value) for name, value in asdict(report.measured).items()},
            "certificate": certificate.to_wire(),
            "stage_ms": report.stage_ms,
            "build_ms": build_ms,
            "size_bytes": sum(len(content) for content in bundle.files.values()),
            "built_by": worker,
            "evicted_at": None,  # here again
        },
    )
    return kernel


def finite_or_none(value: float | None) -> float | None:
    """Databases and JSON have no NaN: unknown is NULL."""
    return value if value is not None and math.isfinite(value) else None
