"""Signing in and out. The admin has no form of its own: it sends people here."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.contrib.auth.forms import AuthenticationForm
from django.contrib.auth.views import LoginView, LogoutView, redirect_to_login
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from apps.accounts.hashing import TooManyAtOnceError, hashing_turn
from apps.accounts.models import User
from apps.accounts.step_up import has_second_factor
from apps.audit.services import Attempt, note_brake, note_refused_sign_in, seconds_to_wait
from apps.console.entering import complete, enter, entry_of
from apps.console.proving import BUSY_SECONDS, prove


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
                _("Many people are signing in. Try again in a few seconds.")
            ) from error
        note_brake(self.attempt)
        minutes = -(-self.wait_seconds // 60)
        raise ValidationError(
            _(
                "There were too many wrong passwords. Try again in %(minutes)s min, or ask an "
                "administrator for a new one."
            )
            % {"minutes": minutes}
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

    def form_valid(self, form: AuthenticationForm) -> HttpResponse:
        user = form.get_user()
        assert isinstance(user, User)
        return enter(self.request, user, via="session", address=self.get_success_url())

    def form_invalid(self, form: AuthenticationForm) -> HttpResponse:
        answer = super().form_invalid(form)
        wait = getattr(form, "wait_seconds", 0)
        if wait:
            answer.status_code = HTTPStatus.TOO_MANY_REQUESTS
            answer.headers["Retry-After"] = str(wait)
        return answer


@never_cache
@require_http_methods(["GET", "POST"])
def sign_in_code(request: HttpRequest) -> HttpResponse:
    """The second page of a sign-in, for whoever has an authenticator app."""
    found = entry_of(request)
    if found is None:
        return redirect("console:sign-in")
    user, entry = found
    if request.method == "GET":
        return render(request, "console/sign_in_code.html", {"title": _("Your code")})
    coded = has_second_factor(user)  # an administrator may have removed it meanwhile
    refusal = prove(request, user, ask_password=False)
    if refusal is None:
        return complete(request, user, entry, code_given=coded)
    context = {"title": _("Your code"), "problem": refusal.detail}
    answer = render(request, "console/sign_in_code.html", context, status=refusal.status)
    if refusal.wait_seconds:
        answer.headers["Retry-After"] = str(refusal.wait_seconds)
    return answer


class SignOut(LogoutView):
    http_method_names = ["post", "options"]


@never_cache
def admin_sign_in(request: HttpRequest) -> HttpResponseBase:
    """The admin's own page would have no brake; whoever is signed in already lacks the right."""
    if request.user.is_authenticated and not request.user.is_staff:
        raise PermissionDenied(_("Only curators and administrators may use the administration."))
    return redirect_to_login(request.GET.get("next", "/admin/"))
