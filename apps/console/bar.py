"""The top bar: the view that refreshes it, and the switch that it shows."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from apps.console.request import page
from apps.policies.models import AdaptationSwitch, ProjectSwitch


def adaptation_switch() -> AdaptationSwitch:
    """The adaptation switch. Without a row adaptation is on; a page does not write one."""
    return AdaptationSwitch.objects.filter(pk=1).first() or AdaptationSwitch(pk=1, on=True)


def killed_projects() -> list[str]:
    """The names of the visible projects in which adaptation is killed."""
    killed = ProjectSwitch.objects.filter(on=False).order_by("project__name")
    return list(killed.values_list("project__name", flat=True))


@page
def bar(request: HttpRequest) -> HttpResponse:
    """The top bar alone, so that its badge is refreshed without the page."""
    return render(request, "console/bar.html", {"section": request.GET.get("section", "")})
