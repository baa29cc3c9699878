"""The report of a week, to read or to print: what changed, who decided, how it ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import Any, NamedTuple

from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop

from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.blueprints.models import KnownRemedy
from apps.console.panels import Panel, render_page
from apps.console.request import page
from apps.console.sentences import in_sentence
from apps.runs.models import Run
from apps.runs.selectors import HUGE_COLUMNS
from apps.violations.models import Violation
from esper.contracts import AdaptationState as S
from esper.contracts import Severity

WEEK = timedelta(days=7)
OLDEST_WEEK = 52
_TAKEN_OUT = (S.ROLLED_BACK, S.REVERTED)
_SAFETY = ("switch.killed", "switch.on", "policy.published", "delegation.granted")


@page
def report(request: HttpRequest) -> HttpResponse:
    ago = weeks_ago(request)
    end = timezone.now() - ago * WEEK
    begin = end - WEEK
    panels = [
        Panel("changes", _("Changes"), "console/report/changes.html", lambda: changes(begin, end)),
        Panel("people", _("Who decided"), "console/report/people.html", lambda: people(begin, end)),
        Panel("runs", _("Runs and findings"), "console/report/runs.html", lambda: runs(begin, end)),
        Panel("safety", _("Safety acts"), "console/report/safety.html", lambda: safety(begin, end)),
    ]
    return render_page(
        request,
        "console/report.html",
        title=_("Weekly report"),
        panels=panels,
        begin=begin,
        end=end,
        ago=ago,
        older=ago + 1 if ago < OLDEST_WEEK else None,
    )


def weeks_ago(request: HttpRequest) -> int:
    text = request.GET.get("ago", "0")
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0
    return min(number, OLDEST_WEEK)


def changes(begin: datetime, end: datetime) -> dict[str, Any]:
    """By what was proposed: how many, and how those ended that have ended."""
    rows = Adaptation.objects.filter(created_at__gt=begin, created_at__lte=end)
    titles = dict(KnownRemedy.objects.values_list("slug", "title"))
    names: dict[str, Counter[str]] = {}
    values = rows.values_list("remedy", "blueprint__slug", "state", "graft_step")
    for remedy, blueprint, state, step in values:
        name = in_sentence(titles.get(remedy, remedy)) if remedy else blueprint
        counts = names.setdefault(name, Counter())
        counts["proposed"] += 1
        counts["applied"] += step is not None
        counts["kept"] += state == S.KEPT
        counts["taken out"] += state in _TAKEN_OUT
        counts["rejected"] += state == S.REJECTED
        counts["expired"] += state == S.EXPIRED
    most = sorted(names.items(), key=lambda item: -item[1]["proposed"])
    total: Counter[str] = sum((counts for _, counts in most), Counter())
    return {"names": most, "total": total, "columns": COLUMNS}


COLUMNS = (
    gettext_noop("proposed"),
    gettext_noop("applied"),
    gettext_noop("kept"),
    gettext_noop("taken out"),
    gettext_noop("rejected"),
    gettext_noop("expired"),
)


@dataclass(frozen=True, slots=True)
class Decider:
    """A person, or a rule, with what they decided and how it ended.

    Attributes:
        minutes: median from the question to the answer; None for a rule.
        overridden: share of their approvals that somebody took back later.
    """

    name: str
    approved: int
    rejected: int
    kept: int
    taken_out: int
    minutes: float | None

    @property
    def rejects(self) -> float | None:
        decided = self.approved + self.rejected
        return self.rejected / decided if decided else None


def people(begin: datetime, end: datetime) -> dict[str, Any]:
    decided = Adaptation.objects.filter(decided_at__gt=begin, decided_at__lte=end)
    by: dict[str, list[Decided]] = {}
    columns = ("decided_by__username", "delegation__granted_by__username")
    for row in decided.values_list(*columns, "state", "created_at", "decided_at"):
        found = Decided(*row)
        by.setdefault(_name(found), []).append(found)
    return {"rows": sorted((_decider(n, rows) for n, rows in by.items()), key=_most_first)}


class Decided(NamedTuple):
    """What the report reads of a decision: of thousands, whose rows are large."""

    person: str | None
    ahead_by: str | None
    state: str
    created_at: datetime
    decided_at: datetime


def _name(row: Decided) -> str:
    if row.person is not None:
        return row.person
    return (
        _("ahead, by %(name)s") % {"name": row.ahead_by}
        if row.ahead_by is not None
        else _("by rule")
    )


def _most_first(one: Decider) -> tuple[int, str]:
    return -(one.approved + one.rejected), one.name


def _decider(name: str, rows: Sequence[Decided]) -> Decider:
    states = Counter(row.state for row in rows)
    waits = [
        max(0.0, (row.decided_at - row.created_at).total_seconds() / 60)
        for row in rows
        if row.person is not None
    ]
    return Decider(
        name=name,
        approved=len(rows) - states[S.REJECTED],
        rejected=states[S.REJECTED],
        kept=states[S.KEPT],
        taken_out=sum(states[state] for state in _TAKEN_OUT),
        minutes=median(waits) if waits else None,
    )


def runs(begin: datetime, end: datetime) -> dict[str, Any]:
    ended = Run.objects.defer(*HUGE_COLUMNS).filter(ended_at__gt=begin, ended_at__lte=end)
    found = Violation.objects.filter(created_at__gt=begin, created_at__lte=end)
    counts = Counter(found.values_list("severity", flat=True))
    return {
        "begun": Run.objects.filter(created_at__gt=begin, created_at__lte=end).count(),
        "ended": sorted(Counter(ended.values_list("state", flat=True)).items()),
        "severities": [(one, counts[one]) for one in reversed(Severity) if counts[one]],
        "resolved": found.exclude(resolved_step=None).count(),
        "acknowledged": found.exclude(acknowledged_at=None).count(),
    }


def safety(begin: datetime, end: datetime) -> dict[str, Any]:
    """Kills, new thresholds, and approvals that were given ahead."""
    rows = AuditEvent.objects.filter(act__in=_SAFETY, at__gt=begin, at__lte=end)
    return {"rows": list(rows.order_by("-id")[:50])}
