"""The statement of accessibility: what is met, how it is checked, and what is not."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.console.panels import render_page
from apps.console.request import page


@page
def accessibility(request: HttpRequest) -> HttpResponse:
    return render_page(
        request, "console/accessibility.html", title=_("Statement of accessibility"), panels=[]
    )
