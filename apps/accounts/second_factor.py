"""An authenticator app beside the password: codes by time (RFC 6238), and recovery codes."""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
from datetime import timedelta

from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.constant_time import bytes_eq
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP
from django.db import transaction

from apps.accounts.actors import Actor
from apps.accounts.encryption import cipher
from apps.accounts.models import RecoveryCode, SecondFactor, User
from apps.accounts.policy import Act, may
from apps.accounts.sessions import end_other_sessions, end_sessions
from apps.accounts.signals import account_changed
from apps.accounts.step_up import demands_second_factor
from apps.rest.clock import now
from apps.rest.problems import Problem

log = logging.getLogger(__name__)

STEP_SECONDS, DRIFT_STEPS, DIGITS = 30, 1, 6
SECRET_BYTES = 20
RECOVERY_CODES = 10
OFFER_HOLDS_FOR = timedelta(minutes=15)
_STORED, _OFFERED = "esper-second-factor", "esper-second-factor-offer"
_RECOVERY_BYTES = 10  # 80 random bits need no slow hash


def offer_secret(user: User) -> str:
    """A new secret for this person's app, encrypted: the page returns it with the first code."""
    return cipher(_OFFERED).encrypt(b"%d:" % user.pk + secrets.token_bytes(SECRET_BYTES)).decode()


def offered_secret(user: User, offer: str) -> bytes:
    """Raises ``Problem`` 422 for an offer to somebody else, or one that is old."""
    try:
        lives = int(OFFER_HOLDS_FOR.total_seconds())
        owner, _, secret = cipher(_OFFERED).decrypt(offer.encode(), ttl=lives).partition(b":")
    except InvalidToken:
        owner, secret = b"", b""
    if owner != b"%d" % user.pk:
        raise Problem(422, "invalid", "This page was open for too long. Scan the new code.")
    return secret


def in_letters(secret: bytes) -> str:
    """As people type it into an app, in groups of four."""
    text = base64.b32encode(secret).decode()
    return " ".join(text[at : at + 4] for at in range(0, len(text), 4))


def app_address(user: User, secret: bytes, host: str) -> str:
    """What the QR code holds."""
    return _totp(secret).get_provisioning_uri(f"{user.get_username()}@{host}", "Esper")


@transaction.atomic
def turn_on(*, user: User, via: str, offer: str, code: str, present: str) -> list[str]:
    """Ask for codes of the app from now on; returns the recovery codes, which are stored nowhere.

    Other browsers, which have given no code, are signed out.

    Args:
        present: the key of the session that stays.

    Raises:
        Problem: the code is wrong, the offer is old, or an app is set up already (422).
    """
    secret = offered_secret(user, offer)
    step = _step_of(secret, _plain(code))
    if step is None:
        raise Problem(422, "invalid", "The code is wrong. Is the clock of the phone right?")
    stored = cipher(_STORED).encrypt(secret)
    factor, made = SecondFactor.objects.get_or_create(
        user=user, defaults={"secret": stored, "last_step": step}
    )
    if not made:
        raise Problem(422, "invalid", "An authenticator app is set up already.")
    _record(user, Actor.person(user, via=via), "second_factor.turned_on")
    end_other_sessions(user=user, via=via, present=present)
    return _new_recovery_codes(factor)


@transaction.atomic
def renew_recovery_codes(*, user: User, via: str) -> list[str]:
    """Ten new ones; the old ones are refused from now on."""
    factor = _factor(user)
    factor.recovery_codes.all().delete()
    _record(user, Actor.person(user, via=via), "second_factor.codes_renewed")
    return _new_recovery_codes(factor)


@transaction.atomic
def turn_off(*, user: User, via: str) -> None:
    """Ask for the password alone.

    Raises:
        Problem: it is off, or this server demands it of the role.
    """
    factor = _factor(user)
    if demands_second_factor(user):
        raise Problem(403, "not-eligible", "This server demands it of your role.")
    factor.delete()
    _record(user, Actor.person(user, via=via), "second_factor.turned_off")


@transaction.atomic
def remove_second_factor(*, account: User, user: User, via: str, reason: str) -> User:
    """For somebody who has lost the phone and the recovery codes. They are signed out everywhere.

    Raises:
        Problem: not allowed, without a reason, or there is none.
    """
    permission = may(user, Act.MANAGE_PEOPLE)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)
    if not reason.strip():
        raise Problem(422, "reason-required", "Say why: the audit log keeps it.")
    _factor(account).delete()
    end_sessions(account)
    _record(account, Actor.person(user, via=via), "second_factor.removed", reason)
    return account


def accept_code(user: User, text: str) -> bool:
    """Whether it is a code of the person's app, or a recovery code. Each of them works once."""
    factor = SecondFactor.objects.filter(user=user).first()
    code = _plain(text)
    if factor is None or not code:
        return False
    if len(code) == DIGITS:
        step = _step_of(_stored_secret(factor), code)
        unused = SecondFactor.objects.filter(pk=factor.pk, last_step__lt=step or 0)
        return step is not None and unused.update(last_step=step) == 1
    return _accept_recovery_code(factor, code)


@transaction.atomic
def _accept_recovery_code(factor: SecondFactor, code: str) -> bool:
    unused = factor.recovery_codes.filter(digest=_digest(code), used_at=None)
    if not unused.update(used_at=now()):
        return False
    left = factor.recovery_codes.filter(used_at=None).count()
    _record(factor.user, Actor.person(factor.user), "second_factor.recovery_code_used", left=left)
    return True


def _stored_secret(factor: SecondFactor) -> bytes:
    try:
        return cipher(_STORED).decrypt(bytes(factor.secret))
    except InvalidToken:
        log.error("%s cannot be read: SECRET_KEY is another; recovery codes still work", factor)
        return b""


def _step_of(secret: bytes, code: str) -> int | None:
    """The time step, of now or its neighbours, whose code this is."""
    if not secret or not code.isascii():
        return None
    present = int(now().timestamp()) // STEP_SECONDS
    found = None
    for step in range(present - DRIFT_STEPS, present + DRIFT_STEPS + 1):
        if bytes_eq(_totp(secret).generate(step * STEP_SECONDS), code.encode()):
            found = step
    return found


def _totp(secret: bytes) -> TOTP:
    return TOTP(secret, DIGITS, SHA1(), STEP_SECONDS)  # noqa: S303 (what all apps can do)


def _new_recovery_codes(factor: SecondFactor) -> list[str]:
    plain = [
        base64.b32encode(secrets.token_bytes(_RECOVERY_BYTES)).decode().lower()
        for _ in range(RECOVERY_CODES)
    ]
    RecoveryCode.objects.bulk_create(
        RecoveryCode(factor=factor, digest=_digest(code)) for code in plain
    )
    return ["-".join(code[at : at + 4] for at in range(0, len(code), 4)) for code in plain]


def _plain(text: str) -> str:
    return "".join(text.split()).replace("-", "").lower()


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()


def _factor(user: User) -> SecondFactor:
    factor = SecondFactor.objects.filter(user=user).first()
    if factor is None:
        raise Problem(422, "invalid", f"{user.get_username()} has no authenticator app set up.")
    return factor


def _record(user: User, actor: Actor, act: str, reason: str = "", **data: object) -> None:
    account_changed.send(
        User,
        actor=actor,
        act=act,
        object_kind="person",
        object_uid=user.get_username(),
        reason=reason,
        data=data,
    )
