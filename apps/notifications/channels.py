"""Channels: which events a person is told of, where, and when not."""

from __future__ import annotations

import base64
import secrets
from datetime import datetime, time, timedelta
from typing import Any
from urllib.parse import urlsplit

from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec
from django.conf import settings
from django.db import transaction
from django.utils import timezone
from django.utils.translation import gettext_noop as _

from apps.accounts.actors import SYSTEM, Actor
from apps.accounts.encryption import cipher
from apps.accounts.models import User
from apps.accounts.projects import people_with
from apps.audit.services import record
from apps.notifications.duty import on_duty
from apps.notifications.models import Channel, ChannelKind, Delivery
from apps.notifications.web_push import (
    BadKeysError,
    Subscription,
    from_text,
    public_text,
    server_key,
)
from apps.rest.problems import Problem
from esper.contracts import Role, codec

MAX_CHANNELS = 20  # of one person
PURPOSE = "esper-channels"
# The events that a person may choose, and what each says.
EVENTS: dict[str, str] = {
    "adaptation.awaiting_approval": _("An adaptation waits for a decision"),
    "adaptation.unanswered": _("Half of the time to decide is over, and nobody has claimed it"),
    "adaptation.probation": _("An adaptation is in the model, on probation"),
    "adaptation.kept": _("An adaptation was kept"),
    "adaptation.rolled_back": _("An adaptation was taken back"),
    "adaptation.expired": _("Nobody decided in time"),
    "adaptation.apply_failed": _("An adaptation could not be applied"),
    "adaptation.rollback_failed": _("An adaptation could not be taken back"),
    "run.unreachable": _("A trainer does not report"),
    "run.failed": _("A run has failed"),
    "run.finished": _("A run has finished"),
    "violation.opened": _("A finding, or a limit was broken"),
    "switch.killed": _("Adaptation was switched off"),
    "switch.on": _("Adaptation was switched on again"),
    "policy.published": _("The thresholds have changed"),
}
# These do not wait for the end of quiet hours.
URGENT = frozenset({"switch.killed", "adaptation.rollback_failed"})
# These go to everybody who wants them, on duty or not.
FOR_EVERYBODY = URGENT | {"adaptation.unanswered"}


@transaction.atomic
def add_channel(
    *,
    owner: User,
    via: str,
    kind: str,
    target: str,
    events: list[str],
    quiet_from: time | None,
    quiet_until: time | None,
    site: str,
    only_on_duty: bool = False,
    keys: dict[str, str] | None = None,
) -> tuple[Channel, str]:
    """A new channel, and of a webhook its signing secret, which is shown once.

    Args:
        keys: of a browser's subscription, ``p256dh`` and ``auth``.

    Raises:
        Problem: too many, no usable address or keys, or no mail server.
    """
    if kind == ChannelKind.PUSH:  # a browser that is added again is the same one
        Channel.objects.filter(owner=owner, kind=kind, target=target).delete()
    if Channel.objects.filter(owner=owner).count() >= MAX_CHANNELS:
        raise Problem(422, "invalid", f"You have {MAX_CHANNELS} channels already; remove one.")
    if (quiet_from is None) != (quiet_until is None):
        raise Problem(422, "invalid", "Give both ends of the quiet hours, or none.")
    if kind == ChannelKind.MAIL:
        target = _mail_address(owner)
    else:
        _check_address(target)
    secret = _secret(kind, target, keys)
    channel = Channel.objects.create(
        owner=owner,
        kind=kind,
        target=target,
        events=sorted(set(events)),
        quiet_from=quiet_from,
        quiet_until=quiet_until,
        secret=cipher(PURPOSE).encrypt(secret.encode()) if secret else b"",
        site=site.rstrip("/"),
        only_on_duty=only_on_duty,
    )
    _record(channel, Actor.person(owner, via=via), "channel.added")
    return channel, secret if kind == ChannelKind.WEBHOOK else ""


def _secret(kind: str, target: str, keys: dict[str, str] | None) -> str:
    """What is kept of a webhook or of a browser; else empty."""
    if kind == ChannelKind.WEBHOOK:
        return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
    if kind != ChannelKind.PUSH:
        return ""
    if keys is None:
        raise Problem(422, "invalid", "A browser push needs the keys of its subscription.")
    try:
        _subscription(target, keys)
    except BadKeysError as error:
        raise Problem(422, "invalid", f"keys: {error}.") from error
    return codec.encode(keys).decode()


@transaction.atomic
def remove_channel(*, channel: Channel, user: User, via: str) -> None:
    """Remove a channel with its log."""
    _record(channel, Actor.person(user, via=via), "channel.removed")
    channel.delete()


def plan_deliveries(
    type: str, data: dict[str, Any], project_id: int | None = None
) -> list[Delivery]:
    """Writes an event for every channel that wants it. In the transaction of the event.

    Args:
        project_id: who does not see this project is not told.
    """
    name = event_name(type, data)
    if name not in EVENTS:
        return []
    channels = Channel.objects.filter(disabled_at=None, owner__is_active=True)
    if project_id:
        channels = channels.filter(owner__in=people_with(list(Role), project_id))
    wanting = [channel for channel in channels if name in channel.events]
    if name not in FOR_EVERYBODY and any(channel.only_on_duty for channel in wanting):
        on_now = {shift.user_id for shift in on_duty()}
        if on_now:  # when nobody is on duty, everybody is told: nothing may be lost
            wanting = [c for c in wanting if not c.only_on_duty or c.owner_id in on_now]
    now = timezone.now()
    return Delivery.objects.bulk_create(
        Delivery(
            channel=channel,
            project_id=project_id,
            type=name,
            data=data,
            due_at=due_at(channel, name, now),
        )
        for channel in wanting
    )


def event_name(type: str, data: dict[str, Any]) -> str:
    """As people choose it: a change of state is named by the state that was reached."""
    if type in {"adaptation.changed", "run.state"}:
        return f"{type.partition('.')[0]}.{data.get('to', '')}"
    return type


def due_at(channel: Channel, name: str, now: datetime) -> datetime:
    """Now, or the end of the channel's quiet hours."""
    begin, end = channel.quiet_from, channel.quiet_until
    if begin is None or end is None or name in URGENT:
        return now
    at = now.time()
    quiet = begin <= at < end if begin <= end else at >= begin or at < end
    if not quiet:
        return now
    until = now.replace(hour=end.hour, minute=end.minute, second=end.second, microsecond=0)
    return until if until > now else until + timedelta(days=1)


@transaction.atomic
def remove_gone(channel: Channel) -> None:
    """Forget a browser that has ended its subscription."""
    _record(channel, SYSTEM, "channel.removed")
    channel.delete()


@transaction.atomic
def replay(*, delivery: Delivery, user: User, via: str) -> Delivery:
    """Send an event again, with the same id, so that a receiver can tell."""
    delivery.due_at, delivery.attempts, delivery.error = timezone.now(), 0, ""
    delivery.save(update_fields=["due_at", "attempts", "error"])
    _record(delivery.channel, Actor.person(user, via=via), "delivery.replayed")
    return delivery


def signing_secret(channel: Channel) -> bytes:
    """The key of a webhook's signatures."""
    text = cipher(PURPOSE).decrypt(bytes(channel.secret)).decode()
    return base64.b64decode(text.removeprefix("whsec_"))


def subscription_of(channel: Channel) -> Subscription:
    """A browser with its keys.

    Raises:
        BadKeysError: ``SECRET_KEY`` was replaced since it was added, so that they are lost.
    """
    try:
        keys = codec.decode(cipher(PURPOSE).decrypt(bytes(channel.secret)))
    except InvalidToken:
        raise BadKeysError(
            "the server's key was replaced: add this browser again in its page Account"
        ) from None
    return _subscription(channel.target, keys)


def _subscription(target: str, keys: dict[str, str]) -> Subscription:
    return Subscription(target, from_text(keys["p256dh"]), from_text(keys["auth"]))


def push_key() -> ec.EllipticCurvePrivateKey:
    """The key of this server at push services; it is replaced with ``SECRET_KEY``."""
    return server_key(settings.SECRET_KEY)


def push_public_key() -> str:
    """Its public half, as a page needs it to subscribe."""
    return public_text(push_key())


def _check_address(target: str) -> None:
    if not _is_usable(target):
        raise Problem(
            422,
            "invalid",
            "target must be an https address in ASCII, without a user name or password.",
        )


def _is_usable(target: str) -> bool:
    try:
        parts = urlsplit(target)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # as it is done to resolve it
    except ValueError:  # a host or a port that nothing can have
        return False
    plain = target.isascii() and target.isprintable() and " " not in target
    anonymous = not parts.username and not parts.password
    return plain and parts.scheme == "https" and bool(host) and port != 0 and anonymous


def _mail_address(owner: User) -> str:
    if not settings.EMAIL_HOST:
        raise Problem(422, "invalid", "This server sends no mail: ESPER_MAIL_HOST is not set.")
    if not owner.email:
        raise Problem(422, "invalid", "Your account has no mail address; an admin can set it.")
    return owner.email


def _record(channel: Channel, actor: Actor, act: str) -> None:
    record(
        actor=actor,
        act=act,
        object_kind="channel",
        object_uid=channel.uid,
        data={"kind": channel.kind, "host": urlsplit(channel.target).hostname or "mail"},
    )
