"""Sends what channels wait for: signed, tried again with growing pauses, and logged."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import random
from datetime import timedelta
from typing import Any

import httpcore
from django.conf import settings
from django.core.mail import send_mail
from django.db.models import F
from django.utils import timezone

from apps.accounts.visibility import sees
from apps.notifications import public_hosts, web_push
from apps.notifications.channels import (
    EVENTS,
    FOR_EVERYBODY,
    push_key,
    remove_gone,
    signing_secret,
    subscription_of,
)
from apps.notifications.models import Channel, ChannelKind, Delivery
from esper.contracts import codec

log = logging.getLogger(__name__)

# Pauses before the next try, about three days together; then it is given up.
PAUSES = tuple(timedelta(seconds=s) for s in (5, 60, 300, 1800, 7200, 21600, 43200, 86400, 86400))
LEASE = timedelta(minutes=2)  # a worker that dies leaves a delivery that is due again after it
JITTER = 0.2
GONE = 410
NO_SUBSCRIPTION = frozenset({404, GONE})  # a push service's answers for a browser that left
PUSH_TRIES = 5  # about two hours; later nobody needs the message
LOST_KEYS = "the browser's keys cannot be read: "
WAITS = "adaptation.awaiting_approval"
KEPT_FOR = timedelta(days=30)


def deliver_due(*, limit: int = 100) -> int:
    """Send what is due; returns how many were delivered."""
    now = timezone.now()
    due = Delivery.objects.filter(due_at__lte=now, channel__disabled_at=None)
    delivered = 0
    for delivery in due.select_related("channel__owner").order_by("due_at")[:limit]:
        # Compare and set: of two workers that see it, one sends it.
        mine = Delivery.objects.filter(pk=delivery.pk, due_at=delivery.due_at)
        if mine.update(due_at=now + LEASE, attempts=F("attempts") + 1):
            delivery.attempts += 1
            delivered += _deliver(delivery)
    return delivered


def forget_old() -> None:
    """Delete deliveries that are long over."""
    Delivery.objects.filter(due_at=None, created_at__lt=timezone.now() - KEPT_FOR).delete()


def _deliver(delivery: Delivery) -> bool:
    if not _may_be_told(delivery):
        delivery.due_at, delivery.status = None, None
        delivery.error = "not sent: the channel's owner has no right to see this any more"
        delivery.save(update_fields=["due_at", "status", "error"])
        return False
    status, error = _send(delivery)
    done = status is not None and 200 <= status < 300
    now = timezone.now()
    delivery.status, delivery.error = status, error[:300]
    delivery.delivered_at = now if done else None
    again = not done and delivery.attempts <= _tries(delivery) and status != GONE
    if again:
        pause = PAUSES[delivery.attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)
        delivery.due_at = now + pause
    else:
        delivery.due_at = None
    delivery.save(update_fields=["status", "error", "delivered_at", "due_at"])
    if not done:
        _look_at_channel(delivery, again=again)
    return done


def _tries(delivery: Delivery) -> int:
    return PUSH_TRIES if delivery.channel.kind == ChannelKind.PUSH else len(PAUSES)


def _look_at_channel(delivery: Delivery, *, again: bool) -> None:
    """After a failure: is this still a place where messages arrive?"""
    channel, status, error = delivery.channel, delivery.status, delivery.error
    if channel.kind == ChannelKind.PUSH:
        if status in NO_SUBSCRIPTION:
            remove_gone(channel)
        elif error.startswith(LOST_KEYS):
            _disable(channel, error)
    elif not again:
        why = "its receiver answered 410" if status == GONE else f"{delivery.attempts} tries failed"
        _disable(channel, f"{why}: {error}" if error else why)


def _may_be_told(delivery: Delivery) -> bool:
    """Asked when it is sent: since the event, rights may have ended, or the run may have moved."""
    owner, run = delivery.channel.owner, delivery.data.get("run")
    if not owner.is_active:
        return False
    if delivery.project_id is not None and owner.access.role_in(delivery.project_id) is None:
        return False
    return not isinstance(run, str) or sees(owner.access.limit, "Run", run)


def _send(delivery: Delivery) -> tuple[int | None, str]:
    """(status of the answer, what went wrong); a mail that was accepted counts as 200."""
    channel = delivery.channel
    try:
        if channel.kind == ChannelKind.MAIL:
            send_mail(_subject(delivery), _text(delivery), None, [channel.target])
            return 200, ""
        if channel.kind == ChannelKind.PUSH:
            status = public_hosts.post(channel.target, *_pushed(delivery))
            return status, "" if 200 <= status < 300 else f"the push service answered {status}"
        body = _slack(delivery) if channel.kind == ChannelKind.SLACK else _standard(delivery)
        headers = {"Content-Type": "application/json", "User-Agent": "Esper"}
        if channel.kind == ChannelKind.WEBHOOK:
            headers |= signature_headers(delivery.uid, body, signing_secret(channel))
        status = public_hosts.post(channel.target, body, headers)
    except public_hosts.ForbiddenHostError as error:
        return None, str(error)
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
        return None, f"no answer: {type(error).__name__} {error}"
    except web_push.BadKeysError as error:
        return None, f"{LOST_KEYS}{error}"
    except OSError as error:  # of the mail server
        return None, f"{type(error).__name__}: {error}"
    except Exception as error:  # of this delivery: the others must go on
        log.exception("delivery %s cannot be sent", delivery.uid)
        return None, f"it cannot be sent: {type(error).__name__}"
    return status, "" if 200 <= status < 300 else f"it answered {status}"


def _pushed(delivery: Delivery) -> tuple[bytes, dict[str, str]]:
    """Body and headers for a push service: which event, and where to read more with own rights."""
    channel, subscription = delivery.channel, subscription_of(delivery.channel)
    number = delivery.data.get("number") if delivery.data.get("adaptation") else None
    told = {
        "title": EVENTS[delivery.type],
        "body": f"A-{number}" if number else "",
        "address": link_of(delivery).removeprefix(channel.site),
        "tag": delivery.data.get("adaptation") or delivery.data.get("run") or delivery.type,
    }
    secure = channel.site.startswith("https://")
    headers = web_push.headers(
        channel.target,
        push_key(),
        contact=channel.site if secure else f"mailto:{settings.DEFAULT_FROM_EMAIL}",
        topic=f"{channel.uid} {told['tag']}",
        urgent=delivery.type in FOR_EVERYBODY or delivery.type == WAITS,
    )
    return web_push.encrypt(codec.encode(told), subscription), headers


def signature_headers(uid: str, body: bytes, key: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks 1.0.0; the time is of this attempt."""
    at = str(int(timezone.now().timestamp()))
    signed = hmac.new(key, f"{uid}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": uid,
        "webhook-timestamp": at,
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
    }


def link_of(delivery: Delivery) -> str:
    """The page of the decision itself, else of the run, else of what the event is about."""
    data, site = delivery.data, delivery.channel.site
    if data.get("adaptation"):
        return f"{site}/adaptations/{data['adaptation']}"
    if data.get("run"):
        return f"{site}/runs/{data['run']}"
    return f"{site}/{'policy' if delivery.type == 'policy.published' else ''}"


def _summary(delivery: Delivery) -> str:
    data = delivery.data
    what = data.get("title") or data.get("text") or data.get("reason") or ""
    number = f"A-{data['number']} " if data.get("adaptation") and data.get("number") else ""
    return f"{EVENTS[delivery.type]}: {number}{what}".rstrip(": ")[:500]


def _standard(delivery: Delivery) -> bytes:
    """Thin, with a summary: whoever wants more reads it with rights of their own."""
    known: dict[str, Any] = {
        name: delivery.data[name]
        for name in ("adaptation", "number", "run", "violation", "from", "to", "severity", "by")
        if name in delivery.data
    }
    data = {**known, "summary": _summary(delivery), "url": link_of(delivery)}
    at = delivery.created_at.isoformat()
    return codec.encode({"type": delivery.type, "timestamp": at, "data": data})


def _slack(delivery: Delivery) -> bytes:
    text = _summary(delivery)
    for character, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):  # no mentions, no links
        text = text.replace(character, name)
    return codec.encode({"text": f"{text}\n<{link_of(delivery)}|Open it>"})


def _subject(delivery: Delivery) -> str:
    return f"[Esper] {' '.join(_summary(delivery).split())}"[:160]


def _text(delivery: Delivery) -> str:
    return (
        f"{_summary(delivery)}\n\n{link_of(delivery)}\n\n"
        f"You get this because you chose it. Your channels: {delivery.channel.site}/me\n"
    )


def _disable(channel: Channel, reason: str) -> None:
    Channel.objects.filter(pk=channel.pk, disabled_at=None).update(
        disabled_at=timezone.now(), disabled_reason=reason[:200]
    )
    log.warning("channel %s is disabled: %s", channel.uid, reason)
