"""Before a dangerous act, a person in a browser gives the password again.

It holds for ten minutes.

A stolen or forgotten session may read and decide, but neither widen what is allowed nor make a
token that outlives it. Tokens have scopes and an end of their own, and are not asked. What makes a
run safer, such as the kill switch, is never asked either: nothing may delay it.
"""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any

from rest_framework.request import Request

from apps.accounts.models import ApiToken
from apps.rest.problems import Problem

HOLDS_FOR = timedelta(minutes=10)
_AT = "password_at"


def note_password(session: MutableMapping[str, Any]) -> None:
    """The person of this session has just given the password."""
    session[_AT] = time.time()


def require_recent_password(request: Request) -> None:
    """Raises ``Problem`` 403 where the browser's person has not given the password lately."""
    if isinstance(request.auth, ApiToken):
        return
    given_at = request._request.session.get(_AT, 0.0)
    if not 0 <= time.time() - given_at <= HOLDS_FOR.total_seconds():
        raise Problem(
            403,
            "password-needed",
            "This needs your password again, because it was not given in the last ten minutes.",
        )
