"""Who is on duty now and later."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.accounts.models import User
from apps.accounts.policy import ALLOWED, Act, may
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.notifications.services import coming_shifts, on_duty


@page
def duty(request: HttpRequest) -> HttpResponse:
    user = person(request)

    def shifts() -> dict[str, Any]:
        manages = may(user, Act.MANAGE_PEOPLE).allowed
        approvers = User.objects.filter(is_active=True, role__in=ALLOWED[Act.APPROVE])
        return {
            "shifts": coming_shifts(),
            "now": {shift.pk for shift in on_duty()},
            "may_take": may(user, Act.CLAIM),
            "manages": manages,
            "people": approvers.order_by("username") if manages else (),
        }

    panels = [Panel("shifts", _("Shifts"), "console/duty/shifts.html", shifts, every=60)]
    return render_page(request, "console/duty.html", title=_("Duty"), panels=panels)
