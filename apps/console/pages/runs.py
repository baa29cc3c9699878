"""The list of runs."""

from __future__ import annotations

from typing import Any

from django.core.paginator import Paginator
from django.db.models import Q
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.console.panels import Panel, render_page
from apps.console.request import choice, page, page_number, person, project_choices
from apps.console.run_rows import annotated, run_rows
from apps.runs.models import Run
from esper.contracts import RunState

PAGE_LENGTH = 50


@page
def runs(request: HttpRequest) -> HttpResponse:
    state = choice(request, "state", RunState)
    mine = request.GET.get("mine") == "1"
    name = request.GET.get("name", "")
    project = request.GET.get("project", "")

    def rows() -> dict[str, Any]:
        found = Run.objects.filter(state=state) if state else Run.objects.all()
        if mine:
            found = found.filter(owner=person(request))
        if project:
            found = found.filter(project__uid=project)
        if name:
            found = found.filter(Q(name__icontains=name) | Q(uid=name))
        shown = Paginator(annotated(found.order_by("-id")), PAGE_LENGTH).get_page(
            page_number(request)
        )
        return {"rows": run_rows(shown), "page": shown}

    panels = [
        Panel("runs", _("Runs"), "console/overview/runs.html", rows, ("run", "adaptation"), every=5)
    ]
    return render_page(
        request,
        "console/runs.html",
        title=_("Runs"),
        panels=panels,
        state=state,
        mine=mine,
        name=name,
        project=project,
        projects=project_choices(person(request)),
        states=list(RunState),
    )
