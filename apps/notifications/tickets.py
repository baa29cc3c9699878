"""Tickets for sockets: short-lived, for one socket, for clients that have a token and no cookie.

A bearer token in the address of a socket would stand in the logs of every proxy on the way. A
ticket that stands there is used up already.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db import transaction
from django.utils import timezone

from apps.accounts.models import ApiToken, User
from apps.notifications.models import SocketTicket

LIVES_FOR = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose socket it is, and what it ends with besides the account.

    Attributes:
        token_id: of the bearer token that asked for its ticket, if one did.
        session_key: of the browser's session that opened it; empty for a ticket.
    """

    user_id: int
    token_id: int | None = None
    session_key: str = ""


def issue_ticket(user: User, token: ApiToken | None) -> tuple[str, datetime]:
    """A new ticket, and when it ends unused. Those that have ended are forgotten."""
    now = timezone.now()
    SocketTicket.objects.filter(expires_at__lt=now).delete()
    secret = f"tkt_{secrets.token_urlsafe(32)}"
    ends = now + LIVES_FOR
    SocketTicket.objects.create(digest=_digest(secret), user=user, token=token, expires_at=ends)
    return secret, ends


@transaction.atomic
def redeem(secret: str) -> Holder | None:
    """Use a ticket up; None for one that is unknown, used or too old."""
    found = SocketTicket.objects.select_for_update().filter(digest=_digest(secret)).first()
    if found is None:
        return None
    found.delete()
    if found.expires_at <= timezone.now():
        return None
    return Holder(found.user_id, found.token_id)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
