"""The steps of every sign-in, with a password or through a provider.

Who has an authenticator app is asked for a code on a second page. Until it is given the browser is
not signed in: its session holds only who has passed the first step, for a few minutes.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from django.conf import settings
from django.contrib.auth import load_backend, login
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.utils.crypto import constant_time_compare
from django.utils.http import url_has_allowed_host_and_scheme

from apps.accounts.models import User
from apps.accounts.sessions import describe_session
from apps.accounts.step_up import (
    Passed,
    has_second_factor,
    note_password,
    note_second_factor,
)
from apps.audit.services import note_sign_in
from apps.console.proving import attempt_of

HOLDS_FOR_SECONDS = 300
_KEY = "entering"


@dataclass(frozen=True, slots=True)
class Entry:
    """Who has passed the first step, how, and where they want to go.

    Attributes:
        auth_hash: of the password; another one ends this sign-in.
        proved_at: when the person gave the password, here or at the provider.
        mfa: the provider says that it has asked for a second factor.
    """

    user_id: int
    auth_hash: str
    via: str
    address: str
    proved_at: float
    mfa: bool = False
    began: float = 0.0


def own_address(request: HttpRequest, address: str) -> str:
    """The address, if it is one of our own pages; the overview otherwise."""
    allowed = url_has_allowed_host_and_scheme(
        address, {request.get_host()}, require_https=request.is_secure()
    )
    return address if allowed else "/"


def enter(
    request: HttpRequest,
    user: User,
    *,
    via: str,
    address: str,
    proved_at: float | None = None,
    mfa: bool = False,
) -> HttpResponse:
    """Sign in whoever has passed the first step, or ask for the second one."""
    began = time.time()
    entry = Entry(
        user.pk,
        user.get_session_auth_hash(),
        via,
        own_address(request, address),
        began if proved_at is None else proved_at,
        mfa,
        began,
    )
    if not has_second_factor(user):
        return complete(request, user, entry)
    request.session.cycle_key()  # whoever has planted a session must not share this step
    request.session[_KEY] = asdict(entry)
    return redirect("console:sign-in-code")


def entry_of(request: HttpRequest) -> tuple[User, Entry] | None:
    """Who has to give a code now; None: nobody, or it was too long ago."""
    kept = request.session.get(_KEY)
    entry = Entry(**kept) if kept else None
    if entry is None or not 0 <= time.time() - entry.began <= HOLDS_FOR_SECONDS:
        return None
    user = load_backend(settings.AUTHENTICATION_BACKENDS[0]).get_user(entry.user_id)
    if not isinstance(user, User):  # deactivated meanwhile
        return None
    same = constant_time_compare(user.get_session_auth_hash(), entry.auth_hash)
    return (user, entry) if same else None


@transaction.atomic
def complete(
    request: HttpRequest, user: User, entry: Entry, *, code_given: bool = False
) -> HttpResponse:
    """Open the session, and go to the page that was asked for."""
    login(request, user)
    session = request.session
    session.pop(_KEY, None)
    attempt = attempt_of(request, user.get_username())
    note_sign_in(user, attempt, via=entry.via)
    session.update(describe_session(request.headers.get("User-Agent", ""), attempt.address))
    note_password(session, entry.proved_at)
    if code_given:
        note_second_factor(session, Passed.HERE)
    elif entry.mfa:
        note_second_factor(session, Passed.AT_THE_PROVIDER)
    return redirect(entry.address)
