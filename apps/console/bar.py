"""The top bar: the view that refreshes it, and the switch that it shows."""

from __future__ import annotations

from django.db.models import Exists
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from apps.console.request import page
from apps.policies.models import AdaptationSwitch, ProjectSwitch


def adaptation_switch() -> AdaptationSwitch:
    """The adaptation switch. Without a row adaptation is on; a page does not write one."""
    return AdaptationSwitch.objects.filter(pk=1).first() or AdaptationSwitch(pk=1, on=True)


def switch_and_kills() -> tuple[AdaptationSwitch, list[str]]:
    """With the names of the visible projects in which adaptation is killed."""
    off = ProjectSwitch.objects.filter(on=False)
    switch = AdaptationSwitch.objects.filter(pk=1).annotate(some=Exists(off)).first()
    if switch is None:
        return AdaptationSwitch(pk=1, on=True), []
    names = off.order_by("project__name").values_list("project__name", flat=True)
    return switch, list(names) if switch.some else []


@page
def bar(request: HttpRequest) -> HttpResponse:
    """The top bar alone, so that its badge is refreshed without the page."""
    return render(request, "console/bar.html", {"section": request.GET.get("section", "")})


@page
def freeze_banner(request: HttpRequest) -> HttpResponse:
    """The freezes in effect alone, so that a page that is open learns of one."""
    return render(request, "console/freeze_banner.html")
