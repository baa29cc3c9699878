"""The list of runs."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponse

from apps.console.panels import Panel, render_page
from apps.console.request import choice, page, person
from apps.console.run_rows import run_rows
from apps.runs.models import Run
from esper.contracts import RunState


@page
def runs(request: HttpRequest) -> HttpResponse:
    state = choice(request, "state", RunState)
    mine = request.GET.get("mine") == "1"

    def rows() -> dict[str, Any]:
        found = Run.objects.filter(state=state) if state else Run.objects.all()
        if mine:
            found = found.filter(owner=person(request))
        return {"rows": run_rows(found.order_by("-id"))}

    panels = [
        Panel("runs", "Runs", "console/overview/runs.html", rows, ("run", "adaptation"), every=5)
    ]
    return render_page(
        request,
        "console/runs.html",
        title="Runs",
        panels=panels,
        state=state,
        mine=mine,
        states=list(RunState),
    )
