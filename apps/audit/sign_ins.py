"""Sign-ins in the audit log, and the brake on guessing passwords that counts them there.

The limits hold for all web processes together, and after a restart. They are for pairs of account
and address first: who guesses somebody's password slows down themselves, not the other person. The
limit of an account over all addresses does not hold for addresses from which its person has signed
in before.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import timedelta

from django.db import transaction
from django.db.models import QuerySet
from django.utils.crypto import salted_hmac

from apps.accounts.actors import SYSTEM, Actor
from apps.accounts.models import User
from apps.audit.chain import record
from apps.audit.models import AuditEvent
from apps.rest.clock import now as database_now

STARTED, REFUSED, BRAKED, ENDED = (
    f"session.{word}" for word in ("started", "refused", "braked", "ended")
)
WINDOW = timedelta(minutes=10)
# Failures in the window, after which further attempts are not looked at.
PER_ACCOUNT_AND_ADDRESS, PER_ADDRESS, PER_ACCOUNT = 5, 30, 50
KNOWN_FOR = timedelta(days=90)
UNKNOWN = "unknown"
_IPV6_NETWORK_BITS = 64  # what one customer has


@dataclass(frozen=True, slots=True)
class Attempt:
    """Somebody at ``address`` gives a password for the account ``name``."""

    name: str
    address: str

    @classmethod
    def of(cls, name: str, remote_address: str) -> Attempt:
        return cls(name.strip(), _network(remote_address))

    @property
    def key(self) -> str:
        """Stands for the name: people type passwords into the wrong field."""
        return salted_hmac("audit.sign_ins", self.name.casefold()).hexdigest()[:20]


def seconds_to_wait(attempt: Attempt) -> int:
    """How long this attempt has to wait; 0: it may be made now."""
    since = database_now() - WINDOW
    refused = AuditEvent.chain.filter(act=REFUSED, at__gt=since)
    of_account = refused.filter(data__name=attempt.key)
    pair = of_account.filter(data__address=attempt.address)
    last_success = _successes(attempt).order_by("-id").values_list("id", flat=True).first()
    if last_success is not None:
        pair = pair.filter(id__gt=last_success)
    waits = [
        _wait(pair, PER_ACCOUNT_AND_ADDRESS),
        _wait(refused.filter(data__address=attempt.address), PER_ADDRESS),
    ]
    if last_success is None:
        waits.append(_wait(of_account, PER_ACCOUNT))
    return max(waits)


@transaction.atomic
def note_sign_in(user: User, attempt: Attempt, *, via: str = "session") -> None:
    """One event for a person who has signed in."""
    _record(STARTED, Actor.person(user, via=via), user.get_username(), attempt)


@transaction.atomic
def note_refused_sign_in(attempt: Attempt) -> None:
    """One event for a wrong password or code, or an unknown account."""
    _record(REFUSED, SYSTEM, _known_name(attempt), attempt)


@transaction.atomic
def note_refused_identity(issuer: str, subject: str, why: str) -> None:
    """One event for somebody whom a provider knows and this server does not let in."""
    record(
        actor=SYSTEM,
        act="session.not_admitted",
        object_kind="identity",
        object_uid=subject[:64],
        data={"issuer": issuer, "why": why},
    )


@transaction.atomic
def note_brake(attempt: Attempt) -> None:
    """One event for each address and window, so that guessing does not fill the log."""
    since = database_now() - WINDOW
    noted = AuditEvent.chain.filter(act=BRAKED, at__gt=since, data__address=attempt.address)
    if not noted.exists():
        _record(BRAKED, SYSTEM, _known_name(attempt), attempt)


@transaction.atomic
def note_sign_out(user: User) -> None:
    """One event for a person who has signed out."""
    record(
        actor=Actor.person(user, via="session"),
        act=ENDED,
        object_kind="person",
        object_uid=user.get_username()[:64],
    )


def _successes(attempt: Attempt) -> QuerySet[AuditEvent]:
    return AuditEvent.chain.filter(
        act=STARTED,
        at__gt=database_now() - KNOWN_FOR,
        data__name=attempt.key,
        data__address=attempt.address,
    )


def _wait(refused: QuerySet[AuditEvent], limit: int) -> int:
    newest = list(refused.order_by("-at").values_list("at", flat=True)[:limit])
    if len(newest) < limit:
        return 0
    return max(1, int((newest[-1] + WINDOW - database_now()).total_seconds()) + 1)


def _record(act: str, actor: Actor, object_uid: str, attempt: Attempt) -> None:
    record(
        actor=actor,
        act=act,
        object_kind="person",
        object_uid=object_uid[:64],
        data={"address": attempt.address, "name": attempt.key},
    )


def _known_name(attempt: Attempt) -> str:
    known = User.objects.filter(username=attempt.name).values_list("username", flat=True).first()
    return known or UNKNOWN


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return UNKNOWN
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed), _IPV6_NETWORK_BITS), strict=False))
    return str(parsed)
