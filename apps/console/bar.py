"""The top bar: its page for the live update, and the switch that it shows."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from apps.console.request import page
from apps.policies.models import AdaptationSwitch


def adaptation_switch() -> AdaptationSwitch:
    """The switch as it is; a page only reads, so a missing row is not written: it means on."""
    return AdaptationSwitch.objects.filter(pk=1).first() or AdaptationSwitch(pk=1, on=True)


@page
def bar(request: HttpRequest) -> HttpResponse:
    """The top bar alone, so that its badge can change without the page."""
    return render(request, "console/bar.html", {"section": request.GET.get("section", "")})
