"""The browser's socket: the events of the topics that it subscribes to, without gaps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from importlib import import_module
from typing import Any
from urllib.parse import parse_qs

from channels.auth import get_user
from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings
from django.contrib.auth.models import AnonymousUser

from apps.notifications.services import (
    event_to_wire,
    events_after,
    group_name,
    last_seq,
    person_group,
    session_group,
)
from apps.notifications.tickets import Holder, redeem
from apps.notifications.topics import recheck
from esper.contracts import codec
from esper.exceptions import CodecError

log = logging.getLogger(__name__)

PING_SECONDS = 10.0
PROGRESS_PERIOD_SECONDS = 0.25
SEND_TIMEOUT_SECONDS = 10.0
MAX_FRAME_BYTES = 4096
MAX_TOPICS = 50
MAX_REPLAY = 2000
TICKET = "ticket"
NOT_SIGNED_IN, SLOW_READER = 4401, 1013


class StreamConsumer(AsyncWebsocketConsumer):
    """``/ws/v1/stream``, see ``docs/protocol.md``.

    An event from the channel layer is a notification: when its number is not the next one, the
    rows in between are read and sent first. Rights are checked again with every ping.
    """

    def __init__(self) -> None:
        super().__init__()
        self.user: Any = AnonymousUser()
        self.holder: Holder | None = None  # of a socket that was opened with a ticket
        self.sent: dict[str, int] = {}  # topic -> the last number that was sent
        self.progress: dict[str, dict[str, Any]] = {}  # topic -> the newest that was not sent
        self.joined: list[str] = []  # groups beside those of the topics
        self.sending = asyncio.Lock()
        self.tasks: list[asyncio.Task[None]] = []
        self.flushing: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        scope: Any = self.scope
        self.holder = await self._holder()
        if self.holder is not None:
            self.user = await database_sync_to_async(self.holder.still)() or AnonymousUser()
        elif TICKET not in self._query():
            self.user = scope.get("user", AnonymousUser())
        if not (self.user.is_authenticated and self.user.is_active):
            await self.close(NOT_SIGNED_IN)
            return
        self.joined = self._groups()
        for group in self.joined:
            await self.channel_layer.group_add(group, self.channel_name)
        await self.accept()
        self.tasks.append(asyncio.create_task(self._beat()))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """A send that fails ends the consumer without ``disconnect``: its tasks must end too."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()

    async def _end(self) -> None:
        tasks = [*self.tasks, *([self.flushing] if self.flushing else [])]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        for group in self.joined:
            await self.channel_layer.group_discard(group, self.channel_name)
        for topic in self.sent:
            await self.channel_layer.group_discard(group_name(topic), self.channel_name)

    # --- what the browser sends ------------------------------------------------------------------

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        try:
            frame = codec.decode(text_data or bytes_data or b"", max_bytes=MAX_FRAME_BYTES)
            op, topic, since = _request(frame)
        except CodecError as error:
            await self._say({"op": "error", "why": str(error)})
            return
        if op == "subscribe":
            await self._subscribe(topic, since)
        else:
            await self._unsubscribe(topic)

    async def _subscribe(self, topic: str, since: int | None) -> None:
        permission = await database_sync_to_async(recheck)(self.user, topic)
        if not permission.allowed:
            await self._say({"op": "refused", "topic": topic, "why": permission.why})
            return
        if len(self.sent) >= MAX_TOPICS and topic not in self.sent:
            why = f"One socket watches at most {MAX_TOPICS} topics."
            await self._say({"op": "refused", "topic": topic, "why": why})
            return
        # Join the group before reading the rows, so that no event in between is lost.
        await self.channel_layer.group_add(group_name(topic), self.channel_name)
        async with self.sending:
            newest = await database_sync_to_async(last_seq)(topic)
            answer: dict[str, Any] = {"op": "subscribed", "topic": topic, "seq": newest}
            if since is None or since > newest:
                since = newest
            elif newest - since > MAX_REPLAY:
                answer["resync"], since = True, newest  # reading the page again costs less
            self.sent[topic] = since
            await self._say(answer)
            await self._catch_up(topic, newest)

    async def _unsubscribe(self, topic: str) -> None:
        if self.sent.pop(topic, None) is not None:
            self.progress.pop(topic, None)
            await self.channel_layer.group_discard(group_name(topic), self.channel_name)
        await self._say({"op": "unsubscribed", "topic": topic})

    # --- what happens ---------------------------------------------------------------------------

    async def feed_event(self, event: dict[str, Any]) -> None:
        message = event["message"]
        topic, seq = message["topic"], message["seq"]
        async with self.sending:
            if topic not in self.sent or seq <= self.sent[topic]:
                return
            if seq == self.sent[topic] + 1:
                await self._say(message)
                self.sent[topic] = seq
            else:
                await self._catch_up(topic, seq)

    async def feed_progress(self, event: dict[str, Any]) -> None:
        message = event["message"]
        if message["topic"] not in self.sent:
            return
        self.progress[message["topic"]] = message
        if self.flushing is None or self.flushing.done():
            self.flushing = asyncio.create_task(self._flush_progress())

    async def session_ended(self, event: dict[str, Any]) -> None:
        """Somebody has signed out with this session."""
        await self.close(NOT_SIGNED_IN)

    async def rights_changed(self, event: dict[str, Any]) -> None:
        """This person was made a member of a project, or is a member no longer."""
        if not await self._still_signed_in():
            await self.close(NOT_SIGNED_IN)

    def _query(self) -> dict[str, list[str]]:
        return parse_qs(self.scope["query_string"].decode("latin-1"))

    async def _holder(self) -> Holder | None:
        """Of the ticket in the address; None without one, and for one that does not hold."""
        given = self._query().get(TICKET)
        return await database_sync_to_async(redeem)(given[0]) if given else None

    def _groups(self) -> list[str]:
        """That of its person, and of its session where it has no ticket."""
        groups = [person_group(self.user.pk)]
        if self.holder is None:
            groups.append(session_group(self.scope["session"].session_key or ""))
        return groups

    async def _catch_up(self, topic: str, until: int) -> None:
        while self.sent[topic] < until:
            events = await database_sync_to_async(events_after)(topic, self.sent[topic])
            if not events:
                return
            for event in events:
                await self._say(event_to_wire(event))
                self.sent[topic] = event.seq

    async def _flush_progress(self) -> None:
        """Send the newest progress of each topic; older progress is dropped."""
        waiting, self.progress = self.progress, {}
        for message in waiting.values():
            await self._say(message)
        await asyncio.sleep(PROGRESS_PERIOD_SECONDS)
        if self.progress:
            self.flushing = asyncio.create_task(self._flush_progress())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            try:
                if not await self._still_signed_in():
                    await self.close(NOT_SIGNED_IN)
                    return
                await self._say({"op": "ping", "time": time.time()})
            except asyncio.CancelledError:
                raise
            except Exception as error:  # a busy database must not disconnect the browsers
                log.warning("socket of %s: %s", self.user, error)

    async def _still_signed_in(self) -> bool:
        """Read session and account again: a sign-out or a disabled account ends the socket."""
        if self.holder is not None:
            self.user = await database_sync_to_async(self.holder.still)() or AnonymousUser()
        else:
            key = self.scope["session"].session_key
            engine = import_module(settings.SESSION_ENGINE)
            fresh: Any = {"session": engine.SessionStore(key)}
            self.user = await get_user(fresh)
        if not (self.user.is_authenticated and self.user.is_active):
            return False
        for topic in list(self.sent):
            permission = await database_sync_to_async(recheck)(self.user, topic)
            if not permission.allowed:
                await self._unsubscribe(topic)
                await self._say({"op": "refused", "topic": topic, "why": permission.why})
        return True

    async def _say(self, message: dict[str, Any]) -> None:
        text = codec.encode(message).decode()
        try:
            async with asyncio.timeout(SEND_TIMEOUT_SECONDS):  # wait_for makes a task of each frame
                await self.send(text_data=text)
        except TimeoutError:
            await self.close(SLOW_READER)


def _request(frame: Any) -> tuple[str, str, int | None]:
    """(op, topic, since); raises ``CodecError`` for anything else."""
    # A list, because a set would hash what the browser sent, and a dict has no hash.
    if not isinstance(frame, dict) or frame.get("op") not in ["subscribe", "unsubscribe"]:
        raise CodecError('a frame is {"op": "subscribe"|"unsubscribe", "topic": …, "since": …}')
    topic, since = frame.get("topic"), frame.get("since")
    if not isinstance(topic, str) or len(topic) > 64:
        raise CodecError("topic is a text: run:<uid>, launch:<uid>, inbox or system")
    if since is not None and (type(since) is not int or since < 0):
        raise CodecError("since is a whole number, the last seq that you have seen")
    return frame["op"], topic, since
