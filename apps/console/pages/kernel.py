"""One kernel: what it costs, who uses it, and what an act on it would change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.db.models import Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.accounts.policy import Act, may
from apps.adaptations.models import Adaptation
from apps.console.job_rows import jobs_of
from apps.console.language import in_words
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.console.status import BUILD_STEPS
from apps.kernels.models import Kernel, SpeedUp
from apps.kernels.selectors import evictable
from apps.runs.selectors import HUGE_COLUMNS_OF_RUN
from apps.workers.models import CompileJob

SHOWN = 50


@page
def kernel(request: HttpRequest, digest: str) -> HttpResponse:
    found = get_kernel(digest)
    if found is None:
        raise Http404("there is no such kernel")
    may_manage = may(person(request), Act.MANAGE_CACHE)

    def part(name: str, title: str, build: Callable[[], dict[str, Any]], *events: str) -> Panel:
        return Panel(name, title, f"console/kernel/{name}.html", build, events)

    def kept() -> dict[str, Any]:
        fresh = get_kernel(digest) or found
        why = why_not_evictable(fresh)
        return {"kernel": fresh, "why_not_evict": why, "may_manage": may_manage}

    panels = [
        part("kept", _("In the cache"), kept, "kernel", "job", "adaptation"),
        part("about", _("About this kernel"), lambda: {"times": stage_times(found)}),
        part("costs", _("Forecast and measured"), lambda: {"costs": costs(found)}),
        part("certificate", _("Certificate"), lambda: {"certificate": found.certificate}),
        part(
            "speed_ups",
            _("Compiled kernels"),
            lambda: {"rows": speed_ups_of(found)},
            "kernel",
        ),
        part(
            "users",
            _("Adaptations that used this kernel"),
            lambda: {"users": users_of(found)},
            "adaptation",
            "job",
        ),
        Panel(
            "builds",
            _("Builds"),
            "console/jobs/ended.html",
            lambda: {"jobs": jobs_of(found)},
            ("job",),
        ),
    ]
    title = f"{found.blueprint_slug} {found.digest[:12]}"
    return render_page(request, "console/kernel.html", title=title, panels=panels, kernel=found)


def get_kernel(digest: str) -> Kernel | None:
    return Kernel.objects.filter(digest=digest).first()


@dataclass(frozen=True, slots=True)
class StageTime:
    name: str
    ms: float
    share: float  # of the whole build


def stage_times(kernel: Kernel) -> list[StageTime]:
    """The time of each step of the build; empty when it was not recorded."""
    times = {name: ms for name, ms in kernel.stage_ms.items() if isinstance(ms, int | float)}
    if "child" in times:  # the compiler's process, of which torch's compiler is a part
        times["child"] = max(0.0, times["child"] - times.get("inductor", 0.0))
    whole = max(sum(times.values()), kernel.build_ms or 0.0)
    return [
        StageTime(
            in_words(BUILD_STEPS.get(name, name.replace("_", " "))), ms, ms / whole if whole else 0
        )
        for name, ms in times.items()
    ]


@dataclass(frozen=True, slots=True)
class Cost:
    """One quantity of a kernel; None where it was not forecast, or not measured."""

    name: str
    unit: str
    forecast: float | None
    measured: float | None
    p95: float | None = None


def costs(kernel: Kernel) -> list[Cost]:
    """Forecast and measured costs."""
    return [
        Cost(_("forward, as certified"), "ms", kernel.forecast_latency_ms, kernel.latency_ms),
        Cost(_("forward pass"), "ms", None, kernel.forward_p50_ms, kernel.forward_p95_ms),
        Cost(_("backward pass"), "ms", None, kernel.backward_p50_ms, kernel.backward_p95_ms),
        Cost(_("memory, as certified"), "MiB", kernel.forecast_memory_mib, kernel.memory_mib),
        Cost(_("most memory at once"), "MiB", None, kernel.peak_memory_mib),
    ]


def users_of(kernel: Kernel) -> list[Adaptation]:
    """Adaptations whose graft or compiled kernel it is."""
    found = Adaptation.objects.filter(_used_by(kernel)).order_by("-pk")
    return list(found.select_related("run", "blueprint").defer(*HUGE_COLUMNS_OF_RUN)[:SHOWN])


def _used_by(kernel: Kernel) -> Q:
    jobs = CompileJob.objects.filter(kernel_digest=kernel.digest)
    trials = SpeedUp.objects.filter(kernel=kernel)
    return Q(uid__in=jobs.values("adaptation_uid")) | Q(uid__in=trials.values("adaptation_uid"))


@dataclass(frozen=True, slots=True)
class SpeedUpRow:
    trial: SpeedUp
    number: int | None  # of its adaptation


def speed_ups_of(kernel: Kernel) -> list[SpeedUpRow]:
    """Trials of a compiled kernel; for an eager kernel, trials of its users' compiled kernels."""
    trials = list(_trials(kernel).select_related("kernel").order_by("-id")[:SHOWN])
    uids = [trial.adaptation_uid for trial in trials]
    numbers = dict(Adaptation.objects.filter(uid__in=uids).values_list("uid", "pk"))
    return [SpeedUpRow(trial, numbers.get(trial.adaptation_uid)) for trial in trials]


def _trials(kernel: Kernel) -> QuerySet[SpeedUp]:
    users = Adaptation.objects.filter(_used_by(kernel))
    return SpeedUp.objects.filter(Q(kernel=kernel) | Q(adaptation_uid__in=users.values("uid")))


def why_not_evictable(kernel: Kernel) -> str:
    """Why the kernel cannot be evicted; empty when it can."""
    if kernel.evicted_at is not None:
        return _("Its files are no longer in the cache.")
    if kernel.pinned_by:
        return _("It is pinned: unpin it before you evict it.")
    if evictable().filter(pk=kernel.pk).exists():
        return ""
    return _("It is in use: an adaptation that has not ended, or a pending command, needs it.")
