"""A person proves who they are: the password, and a code of their app where one is set up.

Both are checked behind the one brake on guessing.
"""

from __future__ import annotations

from dataclasses import dataclass

from django.http import HttpRequest
from django.utils.translation import gettext as _

from apps.accounts.hashing import TooManyAtOnceError, hashing_turn
from apps.accounts.models import User
from apps.accounts.second_factor import accept_code
from apps.accounts.step_up import has_second_factor
from apps.audit.services import Attempt, note_brake, note_refused_sign_in, seconds_to_wait

BUSY_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Refusal:
    """``wait_seconds``: before the next attempt is looked at."""

    status: int
    detail: str
    wait_seconds: int = 0


def attempt_of(request: HttpRequest, name: str) -> Attempt:
    return Attempt.of(name, request.META.get("REMOTE_ADDR", ""))


def prove(request: HttpRequest, user: User, *, ask_password: bool = True) -> Refusal | None:
    """Check what the form holds in ``password`` and ``code``; None: all of it is right.

    Args:
        ask_password: where the person has one.
    """
    attempt = attempt_of(request, user.get_username())
    try:
        with hashing_turn():  # asked inside: guesses sent at once pass the brake one by one
            if wait := seconds_to_wait(attempt):
                note_brake(attempt)
                return Refusal(
                    429,
                    _("Too many wrong passwords or codes. Wait %(minutes)s min.")
                    % {"minutes": -(-wait // 60)},
                    wait,
                )
            wrong = _wrong(request, user, ask_password)
            if wrong:
                note_refused_sign_in(attempt)
                return Refusal(403, wrong)
    except TooManyAtOnceError:
        return Refusal(
            503, _("Many people are signing in. Try again in a few seconds."), BUSY_SECONDS
        )
    return None


def _wrong(request: HttpRequest, user: User, ask_password: bool) -> str:
    """What is wrong; the code is looked at, and used up, after the right password only."""
    given = request.POST
    if (
        ask_password
        and user.has_usable_password()
        and not user.check_password(given.get("password", ""))
    ):
        return _("The password is wrong.")
    if has_second_factor(user) and not accept_code(user, given.get("code", "")):
        return _("The code is wrong.")
    return ""
