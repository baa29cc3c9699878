"""The password again, before an act that the API calls dangerous."""

from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST

from apps.accounts.hashing import TooManyAtOnceError, hashing_turn
from apps.accounts.step_up import note_password
from apps.audit.services import Attempt, note_brake, note_refused_sign_in, seconds_to_wait
from apps.console.request import person


@login_required
@require_POST
@never_cache
def step_up(request: HttpRequest) -> HttpResponse:
    """Check the password behind the same brake as a sign-in; remember that it was given."""
    user = person(request)
    attempt = Attempt.of(user.get_username(), request.META.get("REMOTE_ADDR", ""))
    try:
        with hashing_turn():
            if wait := seconds_to_wait(attempt):
                note_brake(attempt)
                return _refusal(429, f"Too many wrong passwords. Wait {-(-wait // 60)} min.")
            if not user.check_password(request.POST.get("password", "")):
                note_refused_sign_in(attempt)
                return _refusal(403, "The password is wrong.")
    except TooManyAtOnceError:
        return _refusal(503, "Many people are signing in. Try again in a few seconds.")
    note_password(request.session)
    return JsonResponse({"detail": "Thank you."})


def _refusal(status: int, detail: str) -> JsonResponse:
    return JsonResponse({"detail": detail}, status=status)
