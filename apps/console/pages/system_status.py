"""The state of Esper itself: its parts, processes, queues and channels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Count, Min, Q
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop

from apps.console.panels import Panel, render_page
from apps.console.request import page
from apps.console.run_rows import live_runs
from apps.console.status import RUN, Status
from apps.notifications.models import Channel, Delivery, OutboxMessage
from apps.telemetry.services import telemetry_growth
from apps.workers.models import CompileJob
from apps.workers.services import Part, disk_problem, down_processes, parts
from esper.contracts import JobState, RunState

LATE_AFTER = timedelta(minutes=1)  # a message that the relay should have sent by then


@page
def system_status(request: HttpRequest) -> HttpResponse:
    panels = [
        Panel("parts", _("Parts"), "console/status/parts.html", part_rows, every=10),
        Panel("queues", _("Queues and channels"), "console/status/queues.html", queues, every=10),
        Panel("runs", _("Trainers"), "console/status/runs.html", trainers, ("run",), every=10),
    ]
    return render_page(request, "console/status.html", title=_("Status"), panels=panels)


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part with its state in words."""

    name: str
    status: Status
    text: str


_WORKS = Status("good", "check", gettext_noop("Works"))
_SILENT = Status("standby", "ring", gettext_noop("Not reported yet"))
_LATE = Status("serious", "square", gettext_noop("Does not report"))


def part_rows() -> dict[str, Any]:
    """The database answers, because this page was built."""
    rows = [PartRow("database", _WORKS, _("It has answered this page."))]
    disk = disk_problem()
    full = Status("serious", "square", _("Nearly full"))
    rows.append(PartRow("disk", full if disk else _WORKS, disk or str(telemetry_growth())))
    rows += [_part_row(part) for part in parts()]
    down = down_processes()
    problems = [row for row in rows if row.status.tone == "serious"]
    return {"rows": rows, "down": down, "problems": len(problems) + len(down)}


def _part_row(part: Part) -> PartRow:
    if part.late:
        return PartRow(part.name, _LATE, part.text)
    if part.age_seconds is None:
        return PartRow(part.name, _SILENT, _("It starts, or is not installed."))
    return PartRow(
        part.name,
        _WORKS,
        _("Its last report came %(seconds)s s ago.") % {"seconds": round(part.age_seconds)},
    )


@dataclass(frozen=True, slots=True)
class QueueRow:
    """Something that waits to be done."""

    name: str
    waiting: int
    oldest: datetime | None
    late: bool


def queues() -> dict[str, Any]:
    now = timezone.now()
    jobs = CompileJob.objects.filter(state=JobState.QUEUED)
    unsent = OutboxMessage.objects.filter(sent_at=None)
    due = Delivery.objects.filter(due_at__lte=now)
    found = [
        (_("compile jobs"), jobs.aggregate(n=Count("id"), oldest=Min("queued_at"))),
        (_("messages to workers"), unsent.aggregate(n=Count("id"), oldest=Min("created_at"))),
        (_("messages to people"), due.aggregate(n=Count("id"), oldest=Min("due_at"))),
    ]
    rows = [
        QueueRow(
            name=name,
            waiting=of["n"],
            oldest=of["oldest"],
            late=of["oldest"] is not None and now - of["oldest"] > LATE_AFTER,
        )
        for name, of in found
    ]
    channels = Channel.objects.aggregate(
        working=Count("id", filter=Q(disabled_at=None)),
        disabled=Count("id", filter=~Q(disabled_at=None)),
    )
    return {"rows": rows, "channels": channels}


def trainers() -> dict[str, Any]:
    counts = Counter(live_runs().values_list("state", flat=True))
    silent = list(live_runs().filter(state=RunState.UNREACHABLE)[:20])
    return {
        "counts": [(RUN[RunState(state)], number) for state, number in sorted(counts.items())],
        "silent": silent,
    }
