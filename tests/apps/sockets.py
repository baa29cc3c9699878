"""Clients of the websockets, through the real ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator
from channels.db import database_sync_to_async
from django.db import transaction
from django.test import Client

from apps.accounts.models import User
from apps.notifications.services import publish
from esper.contracts import codec

HOST = (b"host", b"testserver")
ORIGIN = (b"origin", b"http://testserver")


def in_database(work: Callable[..., Any]) -> Callable[..., Any]:
    return database_sync_to_async(work)


_communicator: Any = ApplicationCommunicator  # asgiref's is not typed


class Socket:
    """One connection to the ASGI application. (channels.testing would need daphne.)"""

    def __init__(self, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        from esper_web.asgi import application

        address, _, query = path.partition("?")
        self.wire: Any = _communicator(
            application,
            {
                "type": "websocket",
                "path": address,
                "query_string": query.encode(),
                "headers": [HOST, *headers],
                "subprotocols": [],
            },
        )

    async def open(self) -> None:
        answer = await self._connect()
        assert answer["type"] == "websocket.accept", answer

    async def refused(self) -> int:
        """The close code of a handshake that was refused before it was accepted."""
        answer = await self._connect()
        assert answer["type"] == "websocket.close", answer
        return int(answer.get("code", 1000))

    async def say(self, message: Any) -> None:
        text = message if isinstance(message, str) else codec.encode(message).decode()
        await self.wire.send_input({"type": "websocket.receive", "text": text})

    async def next(self) -> Any:
        """The next message, which has to be strict JSON."""
        event = await self.wire.receive_output(timeout=120)
        assert event["type"] == "websocket.send", event
        return codec.decode(event["text"])

    async def silent(self) -> bool:
        return bool(await self.wire.receive_nothing(timeout=0.2))

    async def closed(self) -> int:
        """The close code; the messages before it are skipped."""
        while (event := await self.wire.receive_output(timeout=120))["type"] != "websocket.close":
            pass
        return int(event["code"])

    async def close(self) -> None:
        await self.wire.send_input({"type": "websocket.disconnect", "code": 1000})
        await self.wire.wait(timeout=120)

    async def _connect(self) -> Any:
        await self.wire.send_input({"type": "websocket.connect"})
        return await self.wire.receive_output(timeout=120)


def browser(user: User, origin: bytes | None = ORIGIN[1]) -> Socket:
    client = Client()
    client.force_login(user)
    cookie = f"sessionid={client.cookies['sessionid'].value}".encode()
    origins = [(b"origin", origin)] if origin is not None else []
    return Socket("/ws/v1/stream", [(b"cookie", cookie), *origins])


def trainer_socket(secret: str, run: str, after: int = 0) -> Socket:
    header = (b"authorization", f"Bearer {secret}".encode())
    return Socket(f"/ws/v1/trainer/{run}?after={after}", [header] if secret else [])


@transaction.atomic
def tell(topic: str, **data: Any) -> None:
    publish(topic=topic, type="test.happened", data=data)


class Vanishing:
    """A client that disconnects silently: each send after ``most`` messages fails."""

    def __init__(self, scope: dict[str, Any], incoming: list[dict[str, Any]], most: int) -> None:
        self.scope = scope
        self.incoming = incoming
        self.most = most

    async def receive(self) -> dict[str, Any]:
        if self.incoming:
            return self.incoming.pop(0)
        await asyncio.sleep(300)
        raise TimeoutError("the application waits for more than the failed send")

    async def send(self, message: dict[str, Any]) -> None:
        self.most -= 1
        if self.most < 0:
            raise OSError("gone")

    async def run(self) -> None:
        from esper_web.asgi import application

        untyped: Any = application  # its types know no messages that are built as they are here
        with pytest.raises(OSError, match="gone"):
            await untyped(self.scope, self.receive, self.send)


def beats() -> list[str]:
    return [name for task in asyncio.all_tasks() if "_beat" in (name := repr(task.get_coro()))]
