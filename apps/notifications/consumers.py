"""The browser's socket: the events of the topics that it subscribes to, without gaps."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any
from urllib.parse import parse_qs

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.contrib.auth.models import AnonymousUser

from apps.notifications.fan_out import NOT_SIGNED_IN, FanOut, fan_out
from apps.notifications.rights import rights_of
from apps.notifications.services import event_to_wire, events_after, last_seq
from apps.notifications.tickets import Holder, redeem
from apps.notifications.topics import recheck
from esper.contracts import codec
from esper.exceptions import CodecError

SEND_TIMEOUT_SECONDS = 10.0
CLOSE_TIMEOUT_SECONDS = 1.0
MAX_FRAME_BYTES = 4096
MAX_TOPICS = 50
MAX_REPLAY = 2000
TICKET = "ticket"
SLOW_READER = 1013


class StreamConsumer(AsyncWebsocketConsumer):
    """``/ws/v1/stream``, see ``docs/protocol.md``.

    It answers its browser and reads the events that it has missed. Everything that happens comes
    from ``FanOut``, which shares it with the other sockets, as a text to send.
    """

    channel_layer_alias = ""  # groups are those of FanOut

    def __init__(self) -> None:
        super().__init__()
        self.user: Any = AnonymousUser()
        self.holder = Holder(0)
        self.sent: dict[str, int] = {}  # topic -> the last number that was sent
        self.held: dict[str, list[tuple[int, str]]] = {}  # events that came while rows were read
        self.outbox: asyncio.Queue[str | int] = asyncio.Queue()  # texts; a number closes the socket
        self.fan_out: FanOut = fan_out()
        self.writing: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        holder = await self._holder()
        rights = await database_sync_to_async(rights_of)({holder: ()}) if holder else {}
        if holder is None or holder not in rights:
            await self.close(NOT_SIGNED_IN)
            return
        self.holder, self.user = holder, rights[holder].user
        await self.accept()
        main = asyncio.current_task()
        assert main is not None
        self.writing = asyncio.create_task(self._write())
        self.writing.add_done_callback(lambda _: main.cancel())
        await self.fan_out.enter(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """A send that fails ends the consumer without ``disconnect``."""
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            if self.writing is None or not self.writing.done() or self.writing.cancelled():
                raise
            if error := self.writing.exception():
                raise error from None
        finally:
            await self._end()

    async def _end(self) -> None:
        if self.writing is not None:
            self.writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(self.writing, return_exceptions=True)
            await self.fan_out.leave(self)

    # --- what the browser sends ------------------------------------------------------------------

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        try:
            frame = codec.decode(text_data or bytes_data or b"", max_bytes=MAX_FRAME_BYTES)
            op, topic, since = _request(frame)
        except CodecError as error:
            self._say({"op": "error", "why": str(error)})
            return
        if op == "subscribe":
            await self._subscribe(topic, since)
        else:
            await self._unsubscribe(topic)

    async def _subscribe(self, topic: str, since: int | None) -> None:
        changes = self.fan_out.changes
        permission = await database_sync_to_async(recheck)(self.user, topic)
        if not permission.allowed:
            self._refuse(topic, permission.why)
            return
        if len(self.sent) >= MAX_TOPICS and topic not in self.sent:
            self._refuse(topic, f"One socket watches at most {MAX_TOPICS} topics.")
            return
        self.held[topic] = []
        await self.fan_out.join(self, topic)
        newest = await database_sync_to_async(last_seq)(topic)
        answer: dict[str, Any] = {"op": "subscribed", "topic": topic, "seq": newest}
        if since is None or since > newest:
            since = newest
        elif newest - since > MAX_REPLAY:
            answer["resync"], since = True, newest  # reading the page again costs less
        self._say(answer)
        await self._replay(topic, since, newest)
        if self.fan_out.changes != changes:  # the right may have ended before the socket joined
            self.fan_out.check_soon()

    async def _unsubscribe(self, topic: str) -> None:
        if topic in self.sent:
            await self.fan_out.part(self, topic)
            self._forget(topic)
        self._say({"op": "unsubscribed", "topic": topic})

    async def _replay(self, topic: str, after: int, until: int) -> None:
        """Send the rows in between, then what came meanwhile."""
        while after < until and topic in self.held:
            events = await database_sync_to_async(events_after)(topic, after)
            if not events:
                break
            for event in events:
                self._say(event_to_wire(event))
            after = events[-1].seq
            await self.outbox.join()  # a slow reader must not fill the memory
        if topic not in self.held:
            return  # the right has ended meanwhile
        self.sent[topic] = max(after, until)
        for seq, text in self.held.pop(topic):
            self.offer(topic, seq, text)

    # --- what happens; called by FanOut -----------------------------------------------------------

    def put(self, text: str) -> None:
        self.outbox.put_nowait(text)

    def offer(self, topic: str, seq: int, text: str) -> None:
        if topic in self.held:
            self.held[topic].append((seq, text))
        elif seq > self.sent.get(topic, seq):
            self.sent[topic] = seq
            self.put(text)

    def drop(self, topic: str, why: str) -> None:
        self._forget(topic)
        self._say({"op": "unsubscribed", "topic": topic})
        self._refuse(topic, why)

    def end(self, code: int) -> None:
        while not self.outbox.empty():
            self.outbox.get_nowait()
            self.outbox.task_done()
        self.outbox.put_nowait(code)

    # ---------------------------------------------------------------------------------------------

    async def _holder(self) -> Holder | None:
        """By the ticket in the address, else by the cookie; None for one that does not hold."""
        scope: Any = self.scope
        given = parse_qs(scope["query_string"].decode("latin-1")).get(TICKET)
        if given or "user" not in scope:  # no cookie counts beside a ticket
            return await database_sync_to_async(redeem)(given[0]) if given else None
        if not scope["user"].is_authenticated:
            return None
        return Holder(scope["user"].pk, session_key=scope["session"].session_key or "")

    async def _write(self) -> None:
        """Send what is put, in order; its end is that of the socket."""
        while True:
            waiting = await self.outbox.get()
            if isinstance(waiting, int):
                await self._close(waiting)
                return
            try:
                # wait_for would make a task of each frame
                async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                    await self.send(text_data=waiting)
            except TimeoutError:
                await self._close(SLOW_READER)
                return
            self.outbox.task_done()

    async def _close(self, code: int) -> None:
        """The frame that says why may wait behind others that nobody reads."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await self.close(code)

    def _forget(self, topic: str) -> None:
        self.sent.pop(topic, None)
        self.held.pop(topic, None)

    def _say(self, message: dict[str, Any]) -> None:
        self.put(codec.encode(message).decode())

    def _refuse(self, topic: str, why: str) -> None:
        self._say({"op": "refused", "topic": topic, "why": why})


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
