"""The browsers' sockets of one process: what they share is read, encoded and checked once.

An event of a topic is the same text for each of its sockets; who may watch the topic is settled
when a socket joins it, and again when rights change. One query for all sockets finds whose
sign-in or right has ended: with every ping, and at once when an account, a session or a membership
changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from channels.db import database_sync_to_async
from channels.layers import get_channel_layer

from apps.accounts.policy import Permission
from apps.notifications.rights import rights_of
from apps.notifications.services import (
    ACCOUNTS_GROUP,
    event_to_wire,
    events_after,
    group_name,
    last_seqs,
    session_hash,
)
from apps.notifications.tickets import Holder
from esper.contracts import codec

log = logging.getLogger(__name__)

PING_SECONDS = 10.0
PROGRESS_PERIOD_SECONDS = 0.25
PAUSE_AFTER_ERROR_SECONDS = 1.0
NOT_SIGNED_IN = 4401


class Watcher(Protocol):
    """A socket, as this module knows it."""

    user: Any
    holder: Holder

    def put(self, text: str) -> None:
        """Send a text that belongs to no topic's numbers."""

    def offer(self, topic: str, seq: int, text: str) -> None:
        """Send an event of a topic, unless the socket has it."""

    def drop(self, topic: str, why: str) -> None:
        """The right to watch a topic has ended."""

    def end(self, code: int) -> None:
        """Close the socket."""


@dataclass(eq=False)
class _Topic:
    """One topic and who watches it.

    Attributes:
        newest: the last number that its sockets were offered; None until it was read.
        early: messages that came before that.
        progress: the newest progress that was not sent.
    """

    newest: int | None = None
    sockets: set[Watcher] = field(default_factory=set)
    early: list[dict[str, Any]] = field(default_factory=list)
    progress: dict[str, Any] | None = None


class FanOut:
    """All sockets of one event loop. It works while there is one."""

    def __init__(self) -> None:
        self.sockets: dict[Watcher, set[str]] = {}  # with the topics of each
        self.changes = 0  # of rights, that this process was told of
        self._topics: dict[str, _Topic] = {}
        self._changing = asyncio.Lock()
        self._recheck = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._layer: Any = None
        self._channel = ""

    # --- sockets --------------------------------------------------------------------------------

    async def enter(self, socket: Watcher) -> None:
        """From now on the socket gets pings, and ends with its sign-in."""
        async with self._changing:
            if not self.sockets:
                await self._start()
            self.sockets[socket] = set()

    async def leave(self, socket: Watcher) -> None:
        """Forget a socket that has ended."""
        async with self._changing:
            for topic in self.sockets.pop(socket, ()):
                await self._discard(socket, topic)
            if not self.sockets:
                await self._stop()

    async def join(self, socket: Watcher, topic: str) -> None:
        """From now on the socket is offered each event of the topic that is committed."""
        async with self._changing:
            if topic not in self._topics:
                # Join the group before reading the number, so that no event in between is lost.
                await self._layer.group_add(group_name(topic), self._channel)
                found = self._topics[topic] = _Topic()
                await self._begin(topic, found)
            self._topics[topic].sockets.add(socket)
            self.sockets[socket].add(topic)

    async def part(self, socket: Watcher, topic: str) -> None:
        """The socket is offered no more events of the topic."""
        async with self._changing:
            self.sockets.get(socket, set()).discard(topic)
            await self._discard(socket, topic)

    def check_soon(self) -> None:
        """Look at sign-ins and rights again without waiting for the next ping."""
        self._recheck.set()

    async def _begin(self, name: str, topic: _Topic) -> None:
        try:
            topic.newest = (await database_sync_to_async(last_seqs)([name])).get(name, 0)
        except Exception:
            del self._topics[name]
            raise
        early, topic.early = topic.early, []
        for message in early:
            await self._event(message)

    async def _discard(self, socket: Watcher, name: str) -> None:
        topic = self._topics.get(name)
        if topic is None:
            return
        topic.sockets.discard(socket)
        if not topic.sockets:
            del self._topics[name]
            await self._leave_group(group_name(name))

    async def _leave_group(self, group: str) -> None:
        try:
            await self._layer.group_discard(group, self._channel)
        except Exception as error:  # messages of a group that nobody watches are dropped
            log.warning("could not leave the group %s: %s", group, error)

    async def _start(self) -> None:
        self._layer = get_channel_layer()
        self._channel = await self._layer.new_channel()
        await self._layer.group_add(ACCOUNTS_GROUP, self._channel)
        self._recheck.clear()
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._beat())]

    async def _stop(self) -> None:
        await self._leave_group(ACCOUNTS_GROUP)
        tasks = [*self._tasks, *([self._flushing] if self._flushing else [])]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._flushing = [], None

    # --- what happens ---------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            try:
                event = await self._layer.receive(self._channel)
                await self._handle(event["type"], event["message"])
            except asyncio.CancelledError:
                raise
            except Exception as error:  # a busy database must not end the delivery
                log.warning("an event was not handed on to the browsers: %s", error)
                await asyncio.sleep(PAUSE_AFTER_ERROR_SECONDS)

    async def _handle(self, kind: str, message: dict[str, Any]) -> None:
        if kind == "feed.event":
            await self._event(message)
        elif kind == "feed.progress":
            self._progress(message)
        elif kind == "session.ended":
            self.changes += 1
            self._end_session(message["session"])
        else:  # rights.changed
            self.changes += 1
            self.check_soon()

    async def _event(self, message: dict[str, Any]) -> None:
        """When its number is not the next one, the rows in between are read and sent first."""
        topic = self._topics.get(message["topic"])
        if topic is None:
            return
        if topic.newest is None:
            topic.early.append(message)
        elif message["seq"] == topic.newest + 1:
            _offer(topic, message)
        elif message["seq"] > topic.newest:
            await self._catch_up(message["topic"], topic, message["seq"])

    async def _catch_up(self, name: str, topic: _Topic, until: int) -> None:
        while topic.newest is not None and topic.newest < until:
            after = topic.newest
            for event in await database_sync_to_async(events_after)(name, after):
                if event.seq > topic.newest:  # else it was offered while the rows were read
                    _offer(topic, event_to_wire(event))
            if topic.newest == after:  # the rows are gone
                topic.newest = until

    def _progress(self, message: dict[str, Any]) -> None:
        """The newest progress of each topic is sent; older progress is dropped."""
        topic = self._topics.get(message["topic"])
        if topic is None:
            return
        topic.progress = message
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush_progress())

    async def _flush_progress(self) -> None:
        while waiting := [topic for topic in self._topics.values() if topic.progress]:
            for topic in waiting:
                text, topic.progress = codec.encode(topic.progress).decode(), None
                for socket in topic.sockets:
                    socket.put(text)
            await asyncio.sleep(PROGRESS_PERIOD_SECONDS)

    def _end_session(self, digest: str) -> None:
        """Somebody has signed out."""
        for socket in list(self.sockets):
            key = socket.holder.session_key
            if key and session_hash(key) == digest:
                socket.end(NOT_SIGNED_IN)

    # --- sign-ins, rights and lost notifications ------------------------------------------------

    async def _beat(self) -> None:
        ping_at = time.monotonic() + PING_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, ping_at - time.monotonic())):
                    await self._recheck.wait()
            self._recheck.clear()
            pinging = time.monotonic() >= ping_at
            if pinging:
                ping_at = time.monotonic() + PING_SECONDS
            try:
                await self._check_rights()
                if pinging:
                    await self._find_lost()
                    self._put(codec.encode({"op": "ping", "time": time.time()}).decode())
            except asyncio.CancelledError:
                raise
            except Exception as error:  # a busy database must not disconnect the browsers
                log.warning("the sign-ins of the browsers were not checked: %s", error)

    def _put(self, text: str) -> None:
        for socket in self.sockets:
            socket.put(text)

    async def _check_rights(self) -> None:
        asked: dict[Holder, set[str]] = {}
        for socket, topics in self.sockets.items():
            asked.setdefault(socket.holder, set()).update(topics)
        rights = await database_sync_to_async(rights_of)(asked)
        for socket, topics in list(self.sockets.items()):
            if socket.holder not in asked:
                continue  # it came meanwhile
            found = rights.get(socket.holder)
            if found is None:
                socket.end(NOT_SIGNED_IN)
                continue
            socket.user = found.user
            for topic, why in _refused(topics, found.permissions):
                await self.part(socket, topic)
                socket.drop(topic, why)

    async def _find_lost(self) -> None:
        """A notification that Redis lost costs at most the time between two pings."""
        for name, newest in (await database_sync_to_async(last_seqs)(list(self._topics))).items():
            topic = self._topics.get(name)
            if topic is not None:
                await self._catch_up(name, topic, newest)


def fan_out() -> FanOut:
    """That of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _of_loop:
        _of_loop[loop] = FanOut()
    return _of_loop[loop]


_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, FanOut] = weakref.WeakKeyDictionary()


def _offer(topic: _Topic, message: dict[str, Any]) -> None:
    text, seq = codec.encode(message).decode(), message["seq"]
    for socket in topic.sockets:
        socket.offer(message["topic"], seq, text)
    topic.newest = seq


def _refused(topics: Iterable[str], permissions: dict[str, Permission]) -> list[tuple[str, str]]:
    """The topics whose right has ended, with the reason; one that came meanwhile was checked."""
    asked = [(topic, permissions[topic]) for topic in topics if topic in permissions]
    return [(topic, permission.why) for topic, permission in asked if not permission.allowed]
