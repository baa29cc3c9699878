"""Signing in and out. The admin has no form of its own: it sends people here."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.contrib.auth.forms import AuthenticationForm
from django.contrib.auth.views import LoginView, LogoutView, redirect_to_login
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import transaction
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.views.decorators.cache import never_cache

from apps.accounts.hashing import TooManyAtOnceError, hashing_turn
from apps.accounts.models import User
from apps.accounts.sessions import describe_session
from apps.accounts.step_up import note_password
from apps.audit.services import (
    Attempt,
    note_brake,
    note_refused_sign_in,
    note_sign_in,
    seconds_to_wait,
)

BUSY_SECONDS = 5


class SignInForm(AuthenticationForm):
    """Checks the password only after the brake on guessing, and in its turn."""

    wait_seconds = 0

    def clean(self) -> dict[str, Any]:
        try:
            with hashing_turn():  # asked inside: guesses sent at once pass the brake one by one
                self.wait_seconds = seconds_to_wait(self.attempt)
                if not self.wait_seconds:
                    return self._check_password()
        except TooManyAtOnceError as error:
            self.wait_seconds = BUSY_SECONDS
            raise ValidationError(
                "Many people are signing in. Try again in a few seconds."
            ) from error
        note_brake(self.attempt)
        minutes = -(-self.wait_seconds // 60)
        raise ValidationError(
            f"There were too many wrong passwords. Try again in {minutes} min, or ask an "
            "administrator for a new one."
        )

    @property
    def attempt(self) -> Attempt:
        address = self.request.META.get("REMOTE_ADDR", "") if self.request else ""
        return Attempt.of(self.cleaned_data.get("username", ""), address)

    def _check_password(self) -> dict[str, Any]:
        try:
            return super().clean()
        except ValidationError:
            note_refused_sign_in(self.attempt)
            raise


class SignIn(LoginView):
    template_name = "console/sign_in.html"
    authentication_form = SignInForm
    redirect_authenticated_user = True

    @transaction.atomic
    def form_valid(self, form: AuthenticationForm) -> HttpResponse:
        answer = super().form_valid(form)
        user = form.get_user()
        assert isinstance(user, User)
        assert isinstance(form, SignInForm)
        note_sign_in(user, form.attempt)
        browser = self.request.headers.get("User-Agent", "")
        self.request.session.update(describe_session(browser, form.attempt.address))
        note_password(self.request.session)
        return answer

    def form_invalid(self, form: AuthenticationForm) -> HttpResponse:
        answer = super().form_invalid(form)
        wait = getattr(form, "wait_seconds", 0)
        if wait:
            answer.status_code = HTTPStatus.TOO_MANY_REQUESTS
            answer.headers["Retry-After"] = str(wait)
        return answer


class SignOut(LogoutView):
    http_method_names = ["post", "options"]


@never_cache
def admin_sign_in(request: HttpRequest) -> HttpResponseBase:
    """The admin's own page would have no brake; whoever is signed in already lacks the right."""
    if request.user.is_authenticated and not request.user.is_staff:
        raise PermissionDenied("Only curators and administrators may use the administration.")
    return redirect_to_login(request.GET.get("next", "/admin/"))
