"""Everybody with an account, for administrators: how they sign in, and who has lost a phone."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import PermissionDenied
from django.db.models import Count, Q
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.accounts.models import User, accesses_of
from apps.accounts.policy import Act, may
from apps.accounts.step_up import demands_second_factor
from apps.console.panels import Panel, render_page
from apps.console.request import page, person


@page
def people(request: HttpRequest) -> HttpResponse:
    permission = may(person(request), Act.MANAGE_PEOPLE)
    if not permission.allowed:
        raise PermissionDenied(permission.why)
    panels = [Panel("people", _("People"), "console/people/list.html", people_context)]
    return render_page(request, "console/simple.html", title=_("People"), panels=panels)


def people_context() -> dict[str, Any]:
    unused = Count(
        "second_factor__recovery_codes", filter=Q(second_factor__recovery_codes__used_at=None)
    )
    rows = User.objects.filter(is_service=False).select_related("second_factor")
    rows = rows.annotate(codes_left=unused, providers=Count("identities", distinct=True)).order_by(
        "username"
    )
    accesses = accesses_of(list(rows))
    for one in rows:
        one.access = accesses[one.pk]
    return {"rows": [(one, demands_second_factor(one)) for one in rows]}
