"""Who may fetch what, and how good the cache is."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from django.conf import settings
from django.db.models import Avg, Count, Exists, OuterRef, Q, QuerySet, Sum
from django.db.models.functions import Coalesce

from apps.kernels.models import CacheCounter, Kernel, SpeedUp
from apps.runs.models import Command
from apps.workers.models import CompileJob
from esper.contracts import CommandState, JobState

MIB = 1024 * 1024


class Counter(StrEnum):
    """What the cache counts; hits and misses are counted from the jobs."""

    HOST_HITS = "host_hits"
    SERVER_HITS = "server_hits"
    HOST_EVICTIONS = "host_evictions"
    EVICTIONS = "evictions"
    CORRUPT = "corrupt"
    SCRUBBED = "scrubbed"
    WARMED = "warmed"


def run_may_fetch(run_uid: str, digest: str) -> bool:
    """Whether a trainer may fetch this kernel: only if it was commanded to graft it."""
    return Command.objects.filter(run__uid=run_uid, kernel_digest=digest).exists()


def cache_stats() -> dict[str, Any]:
    """The kernel cache in numbers; null where nothing has been built yet."""
    stored = Kernel.objects.filter(evicted_at=None)
    kernels = stored.aggregate(
        count=Count("id"), bytes=Sum("size_bytes"), pinned=Count("id", filter=~Q(pinned_by=""))
    )
    counted = dict(CacheCounter.objects.values_list("name", "value"))
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
        "pinned": kernels["pinned"],
        "limit_bytes": settings.ESPER_KERNEL_CACHE_MIB * MIB,
        **{str(name): counted.get(name, 0) for name in Counter},
    }


def speed_up_of(adaptation_uid: str) -> SpeedUp | None:
    """The outcome of the adaptation's compiled kernel; None when none was requested."""
    return SpeedUp.objects.filter(adaptation_uid=adaptation_uid).select_related("kernel").first()


def evictable() -> QuerySet[Kernel]:
    """Stored, not pinned, and no open adaptation or unanswered command needs it; oldest first."""
    unanswered = Command.objects.filter(
        kernel_digest=OuterRef("digest"),
        state__in=[CommandState.ISSUED, CommandState.ACCEPTED],
    )
    in_use = Kernel.objects.filter(adaptation__ended_at=None, adaptation__isnull=False)
    return (
        Kernel.objects.filter(evicted_at=None, pinned_by="")
        .exclude(pk__in=in_use.values("pk"))
        .exclude(Exists(unanswered))
        .annotate(used_at=Coalesce("last_used_at", "built_at"))
        .order_by("used_at", "id")
    )
