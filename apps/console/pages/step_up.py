"""The password again, and a code where an app is set up, before an act that the API calls
dangerous."""

from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils.translation import gettext as _
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST

from apps.accounts.step_up import Passed, has_second_factor, note_password, note_second_factor
from apps.console.proving import prove
from apps.console.request import person


@login_required
@require_POST
@never_cache
def step_up(request: HttpRequest) -> HttpResponse:
    """Check them behind the same brake as a sign-in; remember that they were given."""
    user = person(request)
    coded = has_second_factor(user)
    if not coded and not user.has_usable_password():
        detail = _("You have no password here. Sign in again, or set up an authenticator app.")
        return JsonResponse({"detail": detail}, status=403)
    refusal = prove(request, user)
    if refusal is not None:
        return JsonResponse({"detail": refusal.detail}, status=refusal.status)
    note_password(request.session)
    if coded:
        note_second_factor(request.session, Passed.HERE)
    return JsonResponse({"detail": _("Thank you.")})
