"""Kernels: what they cost, who uses them, what an act on them would change; and the cache."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.core.paginator import Page, Paginator
from django.db.models import Max, Q, QuerySet

from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.kernels.cache import SCRUB_BATCH
from apps.kernels.models import CompileJob, Kernel, SpeedUp
from apps.kernels.selectors import evictable

SHOWN = 50
CORRUPT_SHOWN = 5


@dataclass(frozen=True, slots=True)
class KernelFilter:
    blueprint: str = ""
    capability: str = ""
    tier: str = ""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """``speed_up``: the newest trial of a compiled kernel."""

    kernel: Kernel
    speed_up: SpeedUp | None


def kernels(chosen: KernelFilter, page: int) -> tuple[Page[Kernel], list[KernelRow]]:
    """One page of them, and its rows."""
    rows = Kernel.objects.all()
    if chosen.blueprint:
        rows = rows.filter(blueprint_slug=chosen.blueprint)
    if chosen.capability:
        rows = rows.filter(capability=chosen.capability)
    if chosen.tier.isascii() and chosen.tier.isdigit():
        rows = rows.filter(tier=int(chosen.tier[:3]))
    found = Paginator(rows, SHOWN).get_page(page)
    tried = SpeedUp.objects.filter(kernel__in=[kernel.pk for kernel in found.object_list])
    newest = {trial.kernel_id: trial for trial in tried}  # oldest first: the last one stays
    return found, [KernelRow(kernel, newest.get(kernel.pk)) for kernel in found.object_list]


def kernel_choices() -> dict[str, Any]:
    """What there is to filter by."""
    known = Kernel.objects.order_by()
    return {
        "blueprints": sorted(known.values_list("blueprint_slug", flat=True).distinct()),
        "capabilities": sorted(known.values_list("capability", flat=True).distinct()),
        "tiers": sorted(known.values_list("tier", flat=True).distinct()),
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


@dataclass(frozen=True, slots=True)
class Cost:
    """One quantity of a kernel; None where it was not forecast, or not measured."""

    name: str
    unit: str
    forecast: float | None
    measured: float | None
    p95: float | None = None


def costs(kernel: Kernel) -> list[Cost]:
    """What it was forecast to cost beside what it was measured to cost."""
    return [
        Cost("forward, as certified", "ms", kernel.forecast_latency_ms, kernel.latency_ms),
        Cost("forward pass", "ms", None, kernel.forward_p50_ms, kernel.forward_p95_ms),
        Cost("backward pass", "ms", None, kernel.backward_p50_ms, kernel.backward_p95_ms),
        Cost("memory, as certified", "MiB", kernel.forecast_memory_mib, kernel.memory_mib),
        Cost("most memory at once", "MiB", None, kernel.peak_memory_mib),
    ]


def users_of(kernel: Kernel) -> list[Adaptation]:
    """Adaptations that were built with it, or whose compiled kernel it is."""
    found = Adaptation.objects.filter(_used_by(kernel)).order_by("-pk")
    return list(found.select_related("run", "blueprint")[:SHOWN])


def _used_by(kernel: Kernel) -> Q:
    jobs = CompileJob.objects.filter(kernel=kernel)
    trials = SpeedUp.objects.filter(kernel=kernel)
    return Q(uid__in=jobs.values("adaptation_uid")) | Q(uid__in=trials.values("adaptation_uid"))


@dataclass(frozen=True, slots=True)
class SpeedUpRow:
    trial: SpeedUp
    number: int | None  # of its adaptation


def speed_ups_of(kernel: Kernel) -> list[SpeedUpRow]:
    """Trials of it where it is compiled; else the compiled kernels of those who use it."""
    trials = list(_trials(kernel).select_related("kernel").order_by("-id")[:SHOWN])
    uids = [trial.adaptation_uid for trial in trials]
    numbers = dict(Adaptation.objects.filter(uid__in=uids).values_list("uid", "pk"))
    return [SpeedUpRow(trial, numbers.get(trial.adaptation_uid)) for trial in trials]


def _trials(kernel: Kernel) -> QuerySet[SpeedUp]:
    users = Adaptation.objects.filter(_used_by(kernel))
    return SpeedUp.objects.filter(Q(kernel=kernel) | Q(adaptation_uid__in=users.values("uid")))


def why_not_evictable(kernel: Kernel) -> str:
    """In words; empty when its files may be removed now."""
    if kernel.evicted_at is not None:
        return "Its files are not in the cache any more."
    if kernel.pinned_by:
        return "It is pinned: unpin it before you evict it."
    if evictable().filter(pk=kernel.pk).exists():
        return ""
    return "It is in use: an adaptation that has not ended, or a command on its way, needs it."


@dataclass(frozen=True, slots=True)
class CorruptKernel:
    """``has_page``: a kernel that was built anew may have another digest than the corrupt one."""

    digest: str
    blueprint: str
    problem: str
    at: datetime
    has_page: bool


@dataclass(frozen=True, slots=True)
class Scrub:
    """How far the check of the stored kernels is; ``corrupt`` are the newest that failed it."""

    last: datetime | None
    waiting: int
    at_once: int  # how many of them one round checks
    corrupt: list[CorruptKernel]


def scrub_state() -> Scrub:
    stored = Kernel.objects.filter(evicted_at=None)
    return Scrub(
        last=Kernel.objects.aggregate(last=Max("scrubbed_at"))["last"],
        waiting=stored.filter(scrubbed_at=None).count(),
        at_once=SCRUB_BATCH,
        corrupt=_corrupt_kernels(),
    )


def _corrupt_kernels() -> list[CorruptKernel]:
    found = AuditEvent.objects.filter(act="kernel.corrupt").order_by("-id")
    events = list(found[:CORRUPT_SHOWN])
    digests = [event.object_uid for event in events]
    known = set(Kernel.objects.filter(digest__in=digests).values_list("digest", flat=True))
    return [
        CorruptKernel(
            digest=event.object_uid,
            blueprint=str(event.data.get("blueprint", "")),
            problem=event.reason,
            at=event.at,
            has_page=event.object_uid in known,
        )
        for event in events
    ]
