"""The kernels, and the state of their cache."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.core.paginator import Page, Paginator
from django.db.models import Max
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.accounts.policy import Act, may
from apps.audit.models import AuditEvent
from apps.console.panels import Panel, render_page
from apps.console.request import page, page_number, person
from apps.kernels.models import Kernel, SpeedUp
from apps.kernels.selectors import cache_stats
from apps.kernels.services import SCRUB_BATCH

SHOWN = 50
CORRUPT_SHOWN = 5


@page
def kernels(request: HttpRequest) -> HttpResponse:
    chosen = KernelFilter(
        blueprint=request.GET.get("blueprint", ""),
        capability=request.GET.get("capability", ""),
        tier=request.GET.get("tier", ""),
    )
    may_manage = may(person(request), Act.MANAGE_CACHE)

    def cache() -> dict[str, Any]:
        scrub = scrub_state()
        return {"cache": cache_stats(), "scrub": scrub, "may_manage": may_manage}

    def rows() -> dict[str, Any]:
        found, shown = kernel_rows(chosen, page_number(request))
        return {"page": found, "rows": shown}

    events = ("job", "kernel")
    panels = [
        Panel("cache", _("Cache"), "console/kernels/cache.html", cache, events, every=15),
        Panel("kernels", _("Kernels"), "console/kernels/kernels.html", rows, events),
    ]
    return render_page(
        request,
        "console/kernels.html",
        title=_("Kernels"),
        panels=panels,
        chosen=chosen,
        whole=kernel_choices,
    )


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


def kernel_rows(chosen: KernelFilter, page: int) -> tuple[Page[Kernel], list[KernelRow]]:
    """One page of kernels, and its rows."""
    rows = Kernel.objects.all()
    if chosen.blueprint:
        rows = rows.filter(blueprint_slug=chosen.blueprint)
    if chosen.capability:
        rows = rows.filter(capability=chosen.capability)
    if chosen.tier.isascii() and chosen.tier.isdigit():
        rows = rows.filter(tier=int(chosen.tier[:3]))
    found = Paginator(rows, SHOWN).get_page(page)
    tried = SpeedUp.objects.filter(kernel__in=[kernel.pk for kernel in found.object_list])
    newest = {trial.kernel_id: trial for trial in tried}  # oldest first, so the newest stays
    return found, [KernelRow(kernel, newest.get(kernel.pk)) for kernel in found.object_list]


def kernel_choices() -> dict[str, Any]:
    """The choices of the filters."""
    known = Kernel.objects.order_by()
    return {
        "blueprints": sorted(known.values_list("blueprint_slug", flat=True).distinct()),
        "capabilities": sorted(known.values_list("capability", flat=True).distinct()),
        "tiers": sorted(known.values_list("tier", flat=True).distinct()),
    }


@dataclass(frozen=True, slots=True)
class CorruptKernel:
    """``has_page``: False when the kernel was built again with another digest."""

    digest: str
    blueprint: str
    problem: str
    at: datetime
    has_page: bool


@dataclass(frozen=True, slots=True)
class Scrub:
    """Progress of the check of the stored kernels; ``corrupt`` lists the newest failures."""

    last: datetime | None
    waiting: int
    at_once: int  # how many kernels one round checks
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
