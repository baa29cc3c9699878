"""The wall display: large, read-only, without controls, for a screen that everybody sees."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.console.bar import adaptation_switch
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.console.run_rows import live_runs, newest_of, run_rows
from apps.console.waiting import inbox_count, waiting
from apps.runs.selectors import HUGE_COLUMNS_OF_RUN
from apps.violations.selectors import needing_a_person, worst_first

RUNS_SHOWN = 12
FINDINGS_SHOWN = 6


@page
def wall(request: HttpRequest) -> HttpResponse:
    user = person(request)

    def board() -> dict[str, Any]:
        severe = needing_a_person()
        found = waiting(user).select_related("run", "blueprint").defer(*HUGE_COLUMNS_OF_RUN)
        return {
            "switch": adaptation_switch(),
            "rows": run_rows(newest_of(live_runs().order_by("-id"), RUNS_SHOWN)),
            "live": live_runs().count(),
            "first": found.first(),
            "waiting": inbox_count(user),
            "severe": list(
                worst_first(severe)
                .select_related("run")
                .defer(*HUGE_COLUMNS_OF_RUN)[:FINDINGS_SHOWN]
            ),
            "severe_count": severe.count(),
        }

    events = ("adaptation", "run", "violation", "switch")
    panels = [Panel("board", _("All runs"), "console/wall/board.html", board, events, every=5)]
    return render_page(request, "console/wall.html", title=_("Wall display"), panels=panels)
