"""The statement of accessibility: what is met, how it is checked, and what is not."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse

from apps.console.panels import render_page
from apps.console.request import page


@page
def accessibility(request: HttpRequest) -> HttpResponse:
    return render_page(
        request, "console/accessibility.html", title="Statement of accessibility", panels=[]
    )
