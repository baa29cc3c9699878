"""The overview: what needs a person, the runs, and the state of the system."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Count, Min, Q
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.translation import gettext as _

from apps.accounts.models import User
from apps.adaptations.models import Adaptation, Plan
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.console.run_rows import live_runs, newest_of, recent_runs, run_rows
from apps.console.waiting import waiting
from apps.notifications.services import on_duty
from apps.runs.models import Run
from apps.runs.selectors import HUGE_COLUMNS_OF_RUN
from apps.violations.models import Violation
from apps.violations.selectors import needing_a_person, worst_first
from apps.workers.models import CompileJob, Worker
from apps.workers.services import Down, disk_problem, down_processes, parts
from esper.contracts import AdaptationState, JobState, RunState, Severity, WorkerState

ATTENTION_SHOWN = 12
RUNS_SHOWN = 25
_NEEDS_PERSON = (Severity.SERIOUS, Severity.CRITICAL)


@page
def overview(request: HttpRequest) -> HttpResponse:
    events = ("adaptation", "run", "violation", "switch")

    def recent() -> dict[str, Any]:
        shown = run_rows(newest_of(recent_runs(), RUNS_SHOWN + 1))
        return {"rows": shown[:RUNS_SHOWN], "more": len(shown) > RUNS_SHOWN}

    panels = [
        Panel(
            "attention",
            _("Needs a person"),
            "console/overview/attention.html",
            lambda: {"attention": attention(person(request)), "on_duty": on_duty()},
            events,
            every=15,
        ),
        Panel(
            "runs",
            _("Runs"),
            "console/overview/runs.html",
            recent,
            events,
            every=5,
        ),
        Panel(
            "system",
            _("System, last 24 hours"),
            "console/overview/system.html",
            lambda: {"system": system_health()},
            ("adaptation", "job"),
            every=10,
        ),
    ]
    return render_page(request, "console/overview.html", title=_("Overview"), panels=panels)


@dataclass(frozen=True, slots=True)
class Attention:
    """The strip at the top of the overview."""

    waits: list[Adaptation]  # with the members of plans
    violations: list[Violation]
    runs: list[Run]

    @property
    def adaptations(self) -> list[Adaptation]:
        """What is decided on by itself."""
        return [row for row in self.waits if row.plan is None]

    @property
    def plans(self) -> dict[Plan, list[Adaptation]]:
        """What is decided on as a whole."""
        found: dict[Plan, list[Adaptation]] = {}
        for row in self.waits:
            if row.plan is not None:
                found.setdefault(row.plan, []).append(row)
        return found

    @property
    def critical(self) -> list[Violation]:
        """They come before everything else."""
        return [row for row in self.violations if row.severity == Severity.CRITICAL]

    @property
    def serious(self) -> list[Violation]:
        return [row for row in self.violations if row.severity != Severity.CRITICAL]

    @property
    def calm(self) -> bool:
        return not (self.waits or self.violations or self.runs)


def attention(user: User) -> Attention:
    trouble = Q(state=RunState.UNREACHABLE) | ~Q(quarantined_reason="")
    return Attention(
        waits=list(
            waiting(user)
            .select_related("run", "blueprint", "claimed_by", "plan")
            .defer(*HUGE_COLUMNS_OF_RUN)[:ATTENTION_SHOWN]
        ),
        violations=list(
            worst_first(needing_a_person())
            .select_related("run")
            .defer(*HUGE_COLUMNS_OF_RUN)[:ATTENTION_SHOWN]
        ),
        runs=list(live_runs().filter(trouble).select_related("owner")[:ATTENTION_SHOWN]),
    )


@dataclass(frozen=True, slots=True)
class SystemHealth:
    """``cache_hits`` is None when no job ended in the last day.

    ``problems`` are sentences about parts that do not report, and about a full disk; ``down`` are
    the processes that the supervisor of this machine cannot keep running.
    """

    workers_up: int
    workers: int
    queued: int
    oldest_queued: datetime | None
    cache_hits: float | None
    decisions: dict[str, int]
    problems: list[str]
    down: list[Down]

    @property
    def decided(self) -> int:
        return sum(self.decisions.values())


def system_health() -> SystemHealth:
    day = timezone.now() - timedelta(days=1)
    workers = Counter(Worker.objects.values_list("state", flat=True))
    jobs = CompileJob.objects.aggregate(
        queued=Count("id", filter=Q(state=JobState.QUEUED)),
        oldest=Min("queued_at", filter=Q(state=JobState.QUEUED)),
        done=Count("id", filter=Q(state=JobState.DONE, ended_at__gt=day)),
        cached=Count("id", filter=Q(state=JobState.DONE, ended_at__gt=day, cached=True)),
    )
    return SystemHealth(
        workers_up=workers.total() - workers[WorkerState.OFFLINE],
        workers=workers.total(),
        queued=jobs["queued"],
        oldest_queued=jobs["oldest"],
        cache_hits=jobs["cached"] / jobs["done"] if jobs["done"] else None,
        decisions=_decisions_since(day),
        problems=[*filter(None, [disk_problem()]), *(part.text for part in parts() if part.late)],
        down=down_processes(),
    )


def _decisions_since(since: datetime) -> dict[str, int]:
    recent = Adaptation.objects.filter(created_at__gt=since)
    refused = Q(state=AdaptationState.REJECTED)
    return recent.aggregate(
        by_rule=Count("id", filter=~Q(decided_rule="")),
        approved=Count("id", filter=Q(decided_by__isnull=False) & ~refused),
        rejected=Count("id", filter=refused),
        expired=Count("id", filter=Q(state=AdaptationState.EXPIRED)),
    )
