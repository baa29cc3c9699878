"""Publishing events and messages from inside a transaction; both are sent after the commit."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import logging
import threading
from collections.abc import Collection
from datetime import timedelta
from typing import Any

from asgiref.sync import async_to_sync
from celery import current_app
from channels.layers import get_channel_layer
from django.conf import settings
from django.db import transaction
from django.db.models import F
from django.http import HttpRequest
from django.utils import timezone

from apps.accounts.models import User
from apps.audit.services import take_turn
from apps.notifications.channels import EVENTS as EVENTS
from apps.notifications.channels import URGENT as URGENT
from apps.notifications.channels import event_name, plan_deliveries
from apps.notifications.channels import push_public_key as push_public_key
from apps.notifications.duty import coming_shifts as coming_shifts
from apps.notifications.duty import on_duty as on_duty
from apps.notifications.models import Delivery, Feed, FeedEvent, OutboxMessage

log = logging.getLogger(__name__)

PLAN_TASK = "notifications.plan"
DELIVER_TASK = "notifications.deliver"
INBOX_TOPIC = "inbox"
SYSTEM_TOPIC = "system"
ACCOUNTS_GROUP = "accounts"  # of every process with sockets
RIGHTS_ENDING_ACTS = frozenset(
    {"token.revoked", "session.others_ended", "project.member_set", "project.member_removed"}
)
RIGHTS_OF_PERSON = frozenset({"is_active", "role", "password"})
MAX_PROJECTS_WATCHED = 20  # by one page; of further ones it sees changes when it is read again


def run_topic(run_uid: str) -> str:
    return f"run:{run_uid}"


def launch_topic(launch_uid: str) -> str:
    return f"launch:{launch_uid}"


def group_name(topic: str) -> str:
    """Channels allows no colon in a group's name."""
    return topic.replace(":", ".")


def project_topic(topic: str, project_id: int | None) -> str:
    """The inbox, or the system's topic, of one project: the default one's is everybody's."""
    shared = topic in {INBOX_TOPIC, SYSTEM_TOPIC}
    return f"{topic}:{project_id}" if shared and project_id else topic


def publish(
    *, topic: str, type: str, data: dict[str, Any], project_id: int | None = None
) -> FeedEvent:
    """Write one event and notify its topic after the commit. Needs a transaction.

    Args:
        project_id: of the run that an event of the inbox or the system's topic is about.
    """
    take_turn()
    told_to_channels = topic == SYSTEM_TOPIC
    topic = project_topic(topic, project_id)
    if not Feed.objects.filter(topic=topic).update(last_seq=F("last_seq") + 1):
        Feed.objects.get_or_create(topic=topic)
        Feed.objects.filter(topic=topic).update(last_seq=F("last_seq") + 1)
    seq = Feed.objects.values_list("last_seq", flat=True).get(topic=topic)
    event = FeedEvent.objects.create(topic=topic, seq=seq, type=type, data=data)
    if told_to_channels:  # each event is in the system's topic once
        _plan_deliveries(event, project_id)
    transaction.on_commit(lambda: notify(group_name(topic), "feed.event", event_to_wire(event)))
    return event


def _plan_deliveries(event: FeedEvent, project_id: int | None) -> None:
    """A process without the key of commands, such as a compile worker, reads no channels."""
    if event_name(event.type, event.data) not in EVENTS:
        return
    if not settings.ESPER_COMMAND_KEY:
        enqueue(task=PLAN_TASK, queue="control", args=[event.pk, project_id])
    elif plan_deliveries(event.type, event.data, project_id):
        enqueue(task=DELIVER_TASK, queue="control", args=[])


@transaction.atomic
def plan_deliveries_of(event_id: int, project_id: int | None) -> None:
    """What such a process has left to the control worker. A repeated message changes nothing."""
    take_turn()
    event = FeedEvent.objects.get(pk=event_id)
    name = event_name(event.type, event.data)
    planned = Delivery.objects.filter(type=name, data=event.data, created_at__gte=event.at)
    if not planned.exists() and plan_deliveries(event.type, event.data, project_id):
        enqueue(task=DELIVER_TASK, queue="control", args=[])


def event_to_wire(event: FeedEvent) -> dict[str, Any]:
    return {
        "topic": event.topic,
        "seq": event.seq,
        "ts": event.at.isoformat(),
        "type": event.type,
        "data": event.data,
    }


def events_after(topic: str, after: int, *, limit: int = 500) -> list[FeedEvent]:
    return list(FeedEvent.objects.filter(topic=topic, seq__gt=after).order_by("seq")[:limit])


def last_seq(topic: str) -> int:
    return last_seqs([topic]).get(topic, 0)


def last_seqs(topics: Collection[str]) -> dict[str, int]:
    """Of each of these topics that has had an event."""
    return dict(Feed.objects.filter(topic__in=topics).values_list("topic", "last_seq"))


def session_hash(session_key: str) -> str:
    """Names a session in a message: the key itself is a secret, and messages stand in Redis."""
    return hashlib.sha256(session_key.encode()).hexdigest()[:32]


def end_sockets_of_session(sender: type[Any], *, request: HttpRequest, **_: Any) -> None:
    """Receiver of ``user_logged_out``, which is sent before the session is deleted."""
    key = request.session.session_key
    if key:
        message = {"session": session_hash(key)}
        transaction.on_commit(lambda: notify(ACCOUNTS_GROUP, "session.ended", message))


def recheck_sockets(sender: type[Any], *, act: str, **_: Any) -> None:
    """Receiver of ``account_changed``: sign-ins or rights to topics may have ended."""
    if act in RIGHTS_ENDING_ACTS:
        transaction.on_commit(lambda: notify(ACCOUNTS_GROUP, "rights.changed", {}))


def recheck_sockets_of_person(
    sender: type[Any], *, created: bool, update_fields: frozenset[str] | None, **_: Any
) -> None:
    """Receiver of ``post_save`` of a person, who may have been disabled or have a new password."""
    if not created and (update_fields is None or update_fields & RIGHTS_OF_PERSON):
        transaction.on_commit(lambda: notify(ACCOUNTS_GROUP, "rights.changed", {}))


def topics_of(user: User) -> list[str]:
    """The inbox and the system's topic, with those of this person's projects."""
    own = [project for project in sorted(user.access.roles) if project][:MAX_PROJECTS_WATCHED]
    shared = (INBOX_TOPIC, SYSTEM_TOPIC)
    return [project_topic(topic, project) for project in (None, *own) for topic in shared]


def notify(group: str, type: str, message: dict[str, Any]) -> None:
    """Tell a group to look at its rows. A dead Redis loses the message, and fails no caller."""
    try:
        layer = get_channel_layer()
        if layer is None:
            return
        event = {"type": type, "message": message}
        if _sending_loop is None:
            async_to_sync(layer.group_send)(group, event)
        else:
            sending = layer.group_send(group, event)
            sent = asyncio.run_coroutine_threadsafe(sending, _sending_loop)
            sent.add_done_callback(_note_failure)
    except Exception as error:
        log.warning("the notification of %s was not sent: %s", group, error)


# A Celery worker has no event loop of its own. A new loop for each notification would need a new
# connection to Redis each time, which is half of the time of a compile task.
_sending_loop: asyncio.AbstractEventLoop | None = None


def start_notification_thread() -> None:
    """Send from a thread with one lasting loop; for processes that serve no requests."""
    global _sending_loop
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="notifications", daemon=True).start()
    _sending_loop = loop


def _note_failure(done: concurrent.futures.Future[None]) -> None:
    error = done.exception()
    if error is not None:
        log.warning("a notification was not sent: %s", error)


def enqueue(*, task: str, queue: str, args: list[Any]) -> OutboxMessage:
    """Queue a message for a worker; it is sent after the commit, or by the relay if that fails."""
    message = OutboxMessage.objects.create(task=task, queue=queue, args=args)
    transaction.on_commit(lambda: send(message))
    return message


def send(message: OutboxMessage) -> bool:
    """Send one message to the broker; False when it could not be reached."""
    try:
        current_app.send_task(message.task, args=message.args, queue=message.queue, retry=False)
    except Exception as error:
        log.warning("could not send %s to %s: %s", message.task, message.queue, error)
        return False
    OutboxMessage.objects.filter(pk=message.pk).update(
        sent_at=timezone.now(), attempts=F("attempts") + 1
    )
    return True


def relay_outbox(*, older_than: timedelta = timedelta(seconds=1), limit: int = 200) -> int:
    """Send the messages that are still pending; returns how many were sent."""
    waiting = OutboxMessage.objects.filter(
        sent_at=None, created_at__lt=timezone.now() - older_than
    ).order_by("id")[:limit]
    return sum(1 for message in waiting if send(message))


def forget_sent(*, older_than: timedelta = timedelta(days=1)) -> int:
    """Delete messages that were sent some time ago."""
    deleted, _ = OutboxMessage.objects.filter(sent_at__lt=timezone.now() - older_than).delete()
    return deleted
