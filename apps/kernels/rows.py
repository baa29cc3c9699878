"""The rows of stored kernels."""

from __future__ import annotations

from dataclasses import asdict

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from apps.kernels.models import Kernel
from apps.rest.numbers import finite_or_none
from apps.workers.services import replace_kernel
from esper.contracts import KernelBundle, KernelKey, KernelReport


@transaction.atomic
def store_kernel(
    *, bundle: KernelBundle, key: KernelKey, report: KernelReport, worker: str, build_ms: float
) -> Kernel:
    """Write the row of a bundle in the store. When two workers build one key, one row stays."""
    certificate = report.certificate
    before = Kernel.objects.filter(key_hash=key.hash).values_list("digest", flat=True).first()
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
            "evicted_at": None,  # its files are in the store again
        },
    )
    if before is not None and before != bundle.digest:
        replace_kernel(before=before, digest=bundle.digest)
    return kernel


def note_use(kernel: Kernel) -> None:
    """Count that a job has used this kernel."""
    Kernel.objects.filter(pk=kernel.pk).update(uses=F("uses") + 1, last_used_at=timezone.now())
