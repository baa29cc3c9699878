"""Where a person is signed in: their browsers, and the end of all but one of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from django.contrib.auth import HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.models import Session
from django.db import transaction
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.accounts.signals import account_changed
from apps.accounts.step_up import passed_second_factor

STARTED, BROWSER, ADDRESS = "started_at", "browser", "address"
_LONGEST_BROWSER = 200


@dataclass(frozen=True, slots=True)
class SignedIn:
    """One browser in which a person is signed in.

    Attributes:
        started: None for a session of an earlier version of Esper.
        browser: as it calls itself; empty: unknown.
        present: it is the session of this request.
    """

    started: datetime | None
    expires: datetime
    browser: str
    address: str
    present: bool


def describe_session(browser: str, address: str) -> dict[str, str]:
    """What a new session remembers, so that its owner can tell it from others."""
    return {
        STARTED: timezone.now().isoformat(),
        BROWSER: browser[:_LONGEST_BROWSER],
        ADDRESS: address,
    }


def sessions_of(user: User, *, present: str) -> list[SignedIn]:
    """The newest first; ``present``: the key of the request's session, empty for a token."""
    found = []
    for session, data in _sessions(user):
        started = data.get(STARTED)
        found.append(
            SignedIn(
                started=parse_datetime(started) if started else None,
                expires=session.expire_date,
                browser=str(data.get(BROWSER, "")),
                address=str(data.get(ADDRESS, "")),
                present=session.session_key == present,
            )
        )
    return sorted(found, key=lambda one: (one.present, one.expires), reverse=True)


@transaction.atomic
def end_other_sessions(*, user: User, via: str, present: str, reason: str = "") -> int:
    """Sign a person out everywhere but here; return from how many browsers."""
    others = end_sessions(user, but=present)
    account_changed.send(
        User,
        actor=Actor.person(user, via=via),
        act="session.others_ended",
        object_kind="person",
        object_uid=user.get_username(),
        reason=reason,
        data={"count": others},
    )
    return others


def end_sessions(user: User, *, but: str = "") -> int:
    """Without an audit event: for acts that have one of their own."""
    ended = [row.session_key for row, _ in _sessions(user) if row.session_key != but]
    Session.objects.filter(session_key__in=ended).delete()
    return len(ended)


@dataclass(frozen=True, slots=True)
class SignIn:
    """Whose session it is, the hash of the password that opened it, and whether a second factor
    did."""

    user_id: str
    auth_hash: str
    second_factor: bool


def live_sign_ins(keys: Collection[str]) -> dict[str, SignIn]:
    """Those of some sessions that are still open, by their key. One query."""
    if not keys:
        return {}
    rows = Session.objects.filter(session_key__in=keys, expire_date__gt=timezone.now())
    found = {key: _sign_in(data) for key, data in rows.values_list("session_key", "session_data")}
    return {key: sign_in for key, sign_in in found.items() if sign_in is not None}


@lru_cache(maxsize=4096)  # to check the signature costs more than to read the row
def _sign_in(session_data: str) -> SignIn | None:
    data = Session(session_data=session_data).get_decoded()
    user_id, auth_hash = data.get(SESSION_KEY), data.get(HASH_SESSION_KEY)
    if not user_id or not auth_hash:
        return None
    return SignIn(user_id, auth_hash, passed_second_factor(data))


def _sessions(user: User) -> Iterator[tuple[Session, dict[str, str]]]:
    """A session's owner is inside its signed data, so all live ones are read."""
    for session in Session.objects.filter(expire_date__gt=timezone.now()).iterator():
        data = session.get_decoded()
        if data.get(SESSION_KEY) == str(user.pk):
            yield session, data
