"""Before a dangerous act, a person in a browser gives the password again, and a code of their app.

It holds for ten minutes.

A stolen or forgotten session may read and decide, but neither widen what is allowed nor make a
token that outlives it. Tokens have scopes and an end of their own, and are not asked. What makes a
run safer, such as the kill switch, is never asked either: nothing may delay it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from enum import StrEnum
from typing import Any

from django.conf import settings
from rest_framework.request import Request

from apps.accounts.models import ApiToken, SecondFactor, User
from apps.rest.problems import Problem

HOLDS_FOR = timedelta(minutes=10)
SECOND_FACTOR = "second_factor"
_AT = "password_at"


class Passed(StrEnum):
    """Where a session's second factor was given."""

    HERE = "here"
    AT_THE_PROVIDER = "provider"


def note_password(session: MutableMapping[str, Any], at: float | None = None) -> None:
    """The person of this session has just proved who they are; ``at``: when, if not now."""
    session[_AT] = time.time() if at is None else at


def note_second_factor(session: MutableMapping[str, Any], where: Passed) -> None:
    """For as long as the session lives."""
    session[SECOND_FACTOR] = str(where)


def passed_second_factor(session: Mapping[str, Any]) -> bool:
    return SECOND_FACTOR in session


def is_recent(session: Mapping[str, Any]) -> bool:
    """Whether its person has proved who they are in the last ten minutes."""
    at: float = session.get(_AT, 0.0)
    return 0 <= time.time() - at <= HOLDS_FOR.total_seconds()


def has_second_factor(user: User) -> bool:
    return SecondFactor.objects.filter(user=user).exists()


def demands_second_factor(user: User) -> bool:
    """Whether one of the person's roles, of the account or in a project, must have one."""
    demanded = settings.ESPER_TOTP_REQUIRED_ROLES
    return bool(demanded) and not {user.role, *user.access.roles.values()}.isdisjoint(demanded)


def require_recent_password(request: Request) -> None:
    """Raises ``Problem`` 403 where the browser's person has not given the password lately."""
    if isinstance(request.auth, ApiToken):
        return
    session = request._request.session
    if not is_recent(session):
        raise Problem(
            403,
            "password-needed",
            "This needs your password again, because it was not given in the last ten minutes.",
        )
    user = request.user
    assert isinstance(user, User)
    if not passed_second_factor(session) and has_second_factor(user):
        raise second_factor_needed()


def second_factor_needed() -> Problem:
    return Problem(
        403,
        "second-factor-needed",
        "This needs a code of your authenticator app. Sign in again, or set the app up on your "
        "page Account and settings.",
    )
