"""Jobs with leases and fences, workers with heartbeats, and the rows of stored kernels.

A Celery message only says "look at job 17". Who works on it is decided by the lease in the row; the
attempt number is the fence that refuses a worker which wakes up late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from apps.kernels.models import CompileJob, Kernel, Worker
from apps.notifications.services import SYSTEM_TOPIC, enqueue, publish
from esper.contracts import JobState, KernelBundle, KernelKey, KernelReport, WorkerState

COMPILE_TASK = "adaptations.compile"


@dataclass(frozen=True, slots=True)
class Presence:
    """What a worker says of itself with each heartbeat."""

    name: str
    host: str
    capability: str
    queues: list[str]
    devices: list[str]
    versions: dict[str, str]
    started_at: datetime
    busy: bool = False


def heartbeat(presence: Presence) -> None:
    """Note that a worker lives."""
    Worker.objects.update_or_create(
        name=presence.name,
        defaults={
            "host": presence.host,
            "capability": presence.capability,
            "queues": presence.queues,
            "devices": presence.devices,
            "versions": presence.versions,
            "started_at": presence.started_at,
            "heartbeat_at": timezone.now(),
            "state": WorkerState.BUSY if presence.busy else WorkerState.IDLE,
        },
    )


FORGET_WORKERS_AFTER = timedelta(hours=1)


def mark_offline_workers() -> int:
    """Workers without a heartbeat for three periods; returns how many went away."""
    Worker.objects.filter(heartbeat_at__lt=timezone.now() - FORGET_WORKERS_AFTER).delete()
    limit = timezone.now() - timedelta(seconds=3 * settings.ESPER_WORKER_HEARTBEAT_SECONDS)
    return (
        Worker.objects.filter(heartbeat_at__lt=limit)
        .exclude(state=WorkerState.OFFLINE)
        .update(state=WorkerState.OFFLINE)
    )


def queue_is_served(queue: str) -> bool:
    """Does a living worker listen to this queue?"""
    alive = Worker.objects.exclude(state=WorkerState.OFFLINE).values_list("queues", flat=True)
    return any(queue in queues for queues in alive)


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
    ring_worker(job)
    return job


def ring_worker(job: CompileJob) -> None:
    enqueue(task=COMPILE_TASK, queue=f"compile.{job.capability}", args=[job.uid])


def claim_job(job: CompileJob, *, worker: str) -> bool:
    """Take the lease; False when somebody else has it or the job is over."""
    now = timezone.now()
    claimed = CompileJob.objects.filter(
        pk=job.pk, state=JobState.QUEUED, attempt__lt=settings.ESPER_COMPILE_ATTEMPTS
    ).update(
        state=JobState.RUNNING,
        attempt=F("attempt") + 1,
        lease_owner=worker,
        lease_until=now + timedelta(seconds=settings.ESPER_COMPILE_LEASE_SECONDS),
        started_at=now,
    )
    job.refresh_from_db()
    return bool(claimed)


def renew_lease(job: CompileJob) -> bool:
    """Extend the lease of this attempt; False when it was taken away."""
    return bool(
        _attempt(job).update(
            lease_until=timezone.now() + timedelta(seconds=settings.ESPER_COMPILE_LEASE_SECONDS)
        )
    )


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


def fail_job(job: CompileJob, *, error: str, permanent: bool) -> JobState | None:
    """This attempt failed: queued again, or failed for good. None for a late attempt."""
    final = permanent or job.attempt >= settings.ESPER_COMPILE_ATTEMPTS
    state = JobState.FAILED if final else JobState.QUEUED
    changed = _attempt(job).update(
        state=state,
        error=error,
        lease_until=None,
        lease_owner="",
        ended_at=timezone.now() if final else None,
    )
    if not changed:
        return None
    if not final:
        ring_worker(job)
    publish(topic=SYSTEM_TOPIC, type=f"job.{state}", data={"job": job.uid, "error": error[:300]})
    return state


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
