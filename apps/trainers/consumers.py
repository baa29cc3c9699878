"""The trainer's socket: it delivers commands, and tells what waits for a person."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any
from urllib.parse import parse_qs

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer

from apps.accounts.authentication import bearer_secret
from apps.accounts.services import authenticate_token
from apps.adaptations.selectors import waiting_for_a_person
from apps.runs.models import Run
from apps.runs.services import command_to_wire, commands_after, touch, trainer_group
from esper.contracts import TokenScope, codec

log = logging.getLogger(__name__)

PING_SECONDS = 10.0
CHECK_SECONDS = 5.0
SEND_TIMEOUT_SECONDS = 10.0
NOT_SIGNED_IN, NOT_FOUND = 4401, 4404


class TrainerConsumer(AsyncWebsocketConsumer):
    """``/ws/v1/trainer/<uid>?after=<seq>`` with the run's token; cookies are ignored.

    A notification says that there are commands; the rows say which. The rows are read every few
    seconds too, so that a lost notification only costs time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uid = ""
        self.beating: asyncio.Task[None] | None = None
        self.heard_at = -CHECK_SECONDS
        self.told: set[str] = set()  # uids of adaptations that wait for a person

    async def connect(self) -> None:
        self.uid = self.scope["url_route"]["kwargs"]["uid"]
        self.secret = _secret(self.scope)
        self.last_seq = _after(self.scope)
        self.delivering = asyncio.Lock()
        refusal = await database_sync_to_async(why_refused)(self.secret, self.uid)
        if refusal:
            await self.close(refusal)
            return
        await self.channel_layer.group_add(trainer_group(self.uid), self.channel_name)
        await self.accept()
        await self._deliver()
        self.beating = asyncio.create_task(self._beat())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """A send that fails ends the consumer without ``disconnect``: the beat must end with it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()

    async def _end(self) -> None:
        if self.beating is not None:
            self.beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.beating
        if self.uid:
            await self.channel_layer.group_discard(trainer_group(self.uid), self.channel_name)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Any message is a sign of the trainer; it answers commands over HTTP."""
        now = time.monotonic()
        if now - self.heard_at >= CHECK_SECONDS:  # a flood of messages must not become writes
            self.heard_at = now
            await database_sync_to_async(note_report)(self.uid)

    async def command_issued(self, event: dict[str, Any]) -> None:
        await self._deliver()

    async def _deliver(self) -> None:
        async with self.delivering:
            for command in await database_sync_to_async(_commands)(self.uid, self.last_seq):
                await self._say({"type": "command", **command})
                self.last_seq = command["command"]["seq"]

    async def _beat(self) -> None:
        pinged_at = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                stopped = await database_sync_to_async(why_stopped)(self.secret, self.uid)
                if stopped:
                    await self._say({"type": "stopped", "reason": stopped})
                    await self.close(NOT_SIGNED_IN)
                    return
                await self._deliver()
                await self._tell_waiting()
                if time.monotonic() - pinged_at >= PING_SECONDS:
                    pinged_at = time.monotonic()
                    await self._say({"type": "ping", "time": time.time()})
            except asyncio.CancelledError:
                raise
            except TimeoutError:
                await self.close(1013)  # it does not read; it reconnects
                return
            except Exception as error:  # a busy database must not disconnect the trainer
                log.warning("socket of run %s: %s", self.uid, error)

    async def _tell_waiting(self) -> None:
        """For the trainer's console; once for each adaptation."""
        for entry in await database_sync_to_async(_waiting)(self.uid):
            if entry["adaptation"] not in self.told:
                self.told.add(entry["adaptation"])
                await self._say({"type": "waiting", **entry})

    async def _say(self, message: dict[str, Any]) -> None:
        text = codec.encode(message).decode()
        await asyncio.wait_for(self.send(text_data=text), SEND_TIMEOUT_SECONDS)


def why_refused(secret: str | None, uid: str) -> int:
    """The close code for a caller that is not the run's trainer, else 0."""
    token = authenticate_token(secret) if secret else None
    if token is None or TokenScope.RUN_WRITE not in token.scopes:
        return NOT_SIGNED_IN
    run = Run.objects.filter(uid=uid).first()
    if run is None or token.run_uid != uid:
        return NOT_FOUND
    touch(run)
    return 0


def why_stopped(secret: str | None, uid: str) -> str:
    """Why this socket has to be closed; empty while it may stay open."""
    run = Run.objects.filter(uid=uid).first()
    if run is None or run.ended:
        return f"the run is {run.state}" if run else "the run no longer exists"
    if secret is None or authenticate_token(secret) is None:
        return "the token was revoked, by a newer trainer of this run or by a person"
    return ""


def note_report(uid: str) -> None:
    """The trainer has sent something. What this server sends it is no report of the trainer."""
    run = Run.objects.filter(uid=uid).first()
    if run is not None and not run.ended:
        touch(run)


def _commands(uid: str, after: int) -> list[dict[str, Any]]:
    run = Run.objects.get(uid=uid)
    return [command_to_wire(command) for command in commands_after(run, after)]


def _waiting(uid: str) -> list[dict[str, str]]:
    entries = waiting_for_a_person().filter(run__uid=uid).select_related("blueprint")
    return [
        {"adaptation": entry.uid, "layer": entry.layer, "blueprint": entry.slug}
        for entry in entries
    ]


def _secret(scope: Any) -> str | None:
    headers = dict(scope["headers"])
    return bearer_secret(headers.get(b"authorization", b"").decode("latin-1"))


def _after(scope: Any) -> int:
    given = parse_qs(scope["query_string"].decode("latin-1")).get("after", ["0"])[0]
    return int(given) if given.isascii() and given.isdigit() and len(given) <= 18 else 0
