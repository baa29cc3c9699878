"""A small control plane that speaks the real protocol over real sockets, for the SDK's tests."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import uvicorn

from esper.contracts import (
    Command,
    CommandKind,
    KernelBundle,
    SafetyPolicy,
    codec,
    signing,
    telemetry_body,
)

Answer = tuple[int, dict[str, Any] | bytes]


class ControlPlane:
    """One run's server. It keeps everything that was sent to it, for a test to read.

    ``lose_replies``: so many requests are done, and then answered with 503.
    """

    def __init__(self) -> None:
        self.command_key = signing.generate_private_key()
        self.kernel_key = signing.generate_private_key()
        self.uid = str(uuid.uuid4())
        self.epochs: dict[str, int] = {}  # of every run that ever registered
        self.policy = SafetyPolicy()
        self.registrations: list[dict[str, Any]] = []
        self.hellos: list[dict[str, Any]] = []
        self.stored_to = 0
        self.batches: list[dict[str, Any]] = []
        self.duplicates = 0
        self.acks: list[dict[str, Any]] = []
        self.rollbacks: list[dict[str, Any]] = []
        self.remedies: list[dict[str, Any]] = []
        self.proposals: list[dict[str, Any]] = []
        self.verdicts: list[dict[str, Any]] = []
        self.proposal_answer = {"adaptation": "p1", "state": "awaiting_approval"}
        self.finishes: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []  # what GET commands answers
        self.kernels: dict[str, dict[str, bytes]] = {}
        self.settled: list[dict[str, Any]] = []
        self.last_command_seq = 0
        self.clock = time.time  # of the server
        self.registered_seconds_ago = 0.0  # the answer to the registration is that old
        self.hello_has_time = True
        self.lose_replies = 0
        self.telemetry_types: list[str] = [telemetry_body.MEDIA_TYPE]  # beside JSON
        self.media_types: set[str] = set()  # of what was posted
        self.answers_to: dict[str, Answer] = {}  # by last part of the path: said instead
        self._replies: dict[str, Answer] = {}
        self._sockets: set[asyncio.Queue[dict[str, Any]]] = set()
        self._port = _free_port()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- for tests -----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def epoch(self) -> int:
        return self.epochs.get(self.uid, 0)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [entry for batch in self.batches for entry in batch["metrics"]]

    @property
    def frames(self) -> list[dict[str, Any]]:
        return [entry for batch in self.batches for entry in batch["frames"]]

    @property
    def findings(self) -> list[dict[str, Any]]:
        return [entry for batch in self.batches for entry in batch["findings"]]

    def start(self) -> ControlPlane:
        config = uvicorn.Config(
            self._app,
            host="127.0.0.1",
            port=self._port,
            log_level="critical",
            interface="asgi3",
            lifespan="off",
            ws="websockets-sansio",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server is not None and self._server.started, "the server starts")
        return self

    def stop(self) -> None:
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(300)
        self._server = None

    def command(self, kind: CommandKind, seq: int, **fields: Any) -> Command:
        now = time.time()
        given: dict[str, Any] = {
            "run": self.uid,
            "epoch": self.epoch,
            "issued_at": now,
            "expires_at": now + 600,
            **fields,
        }
        return Command(kind=kind, seq=seq, **given)

    def send(self, command: Command, *, key: str = "", logged: bool = True) -> None:
        """Sign and deliver; ``key`` signs in the server's stead."""
        signature = signing.sign(command.signing_bytes(), key or self.command_key)
        entry = {"command": command.to_wire(), "signature": signature}
        if logged:
            self.log.append(entry)
        self.push({"type": "command", **entry})

    def push(self, message: dict[str, Any]) -> None:
        loop = self._loop
        if loop is not None:
            for waiting in list(self._sockets):
                loop.call_soon_threadsafe(waiting.put_nowait, message)

    def add_kernel(self, bundle: KernelBundle) -> str:
        self.kernels[bundle.digest] = dict(bundle.files)
        return bundle.digest

    def acks_of(self, seq: int) -> list[dict[str, Any]]:
        return [ack for ack in self.acks if ack["seq"] == seq]

    @property
    def listeners(self) -> int:
        return len(self._sockets)

    # -- ASGI ----------------------------------------------------------------------------------

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self._loop = asyncio.get_running_loop()
        if scope["type"] == "websocket":
            await self._stream(scope, receive, send)
        else:
            await self._request(scope, receive, send)

    async def _stream(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for entry in self._log_after(scope):
            waiting.put_nowait({"type": "command", **entry})
        self._sockets.add(waiting)
        pusher = asyncio.create_task(_push_all(waiting, send))
        try:
            while (await receive())["type"] != "websocket.disconnect":
                pass
        finally:
            pusher.cancel()
            self._sockets.discard(waiting)

    async def _request(self, scope: Any, receive: Any, send: Any) -> None:
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        answer: dict[str, Any] | bytes
        if scope["method"] == "GET" and scope["path"].endswith("/commands"):
            status, answer = 200, {"results": self._log_after(scope)}
        else:
            status, answer = self._answer(scope["path"], headers, raw)
        if self.lose_replies > 0 and scope["method"] == "POST":
            self.lose_replies -= 1
            status, answer = 503, {"code": "lost", "detail": "the reply was lost"}
        body = answer if isinstance(answer, bytes) else codec.encode(answer)
        start = {"type": "http.response.start", "status": status, "headers": []}
        await send(start)
        await send({"type": "http.response.body", "body": body})

    def _log_after(self, scope: Any) -> list[dict[str, Any]]:
        after = int(parse_qs(scope["query_string"].decode())["after"][0])
        return [entry for entry in self.log if entry["command"]["seq"] > after]

    def _answer(self, path: str, headers: dict[str, str], raw: bytes) -> Answer:
        parts = path.removeprefix("/api/v1/").split("/")
        if parts[-1] in self.answers_to:
            return self.answers_to[parts[-1]]
        if not headers.get("authorization", "").startswith("Bearer esp_"):
            return 401, {"code": "unauthorized", "detail": "no token"}
        if parts[0] == "kernels":
            files = self.kernels.get(parts[1], {})
            return (200, files[parts[2]]) if parts[2] in files else (404, {"code": "not-found"})
        body = self._decoded(headers, raw)
        if parts == ["runs"]:
            return self._once(headers["idempotency-key"], lambda: self._register(body))
        if parts[1] not in self.epochs:
            return 404, {"code": "not-found"}
        if body["epoch"] != self.epochs[parts[1]]:
            return 409, {"code": "old-epoch", "detail": "another start of this run"}
        return self._post(parts[2:], body)

    def _decoded(self, headers: dict[str, str], raw: bytes) -> Any:
        media_type = headers["content-type"]
        self.media_types.add(media_type)
        if media_type == "application/json":
            return codec.decode(raw)
        assert media_type in self.telemetry_types
        body = telemetry_body.decode_body(raw)
        for frame in body["frames"]:
            frame["values"] = base64.b64encode(frame["values"]).decode()
        return body

    def _post(self, parts: list[str], body: dict[str, Any]) -> Answer:
        if parts == ["telemetry"]:
            return 202, self._store(body)
        kept: dict[str, list[dict[str, Any]]] = {
            "hello": self.hellos,
            "rollbacks": self.rollbacks,
            "remedies": self.remedies,
            "remedy-proposals": self.proposals,
            "remedy-verdicts": self.verdicts,
            "finish": self.finishes,
            "ack": self.acks,
        }
        kept[parts[-1]].append(body)
        if parts == ["remedy-proposals"]:
            return 200, {**self.proposal_answer}
        if parts != ["hello"]:
            return 200, {}
        told = {"server_time": self.clock()} if self.hello_has_time else {}
        return 200, {"settled": self.settled, **told}

    def _once(self, key: str, act: Callable[[], Answer]) -> Answer:
        if key not in self._replies:
            self._replies[key] = act()
        return self._replies[key]

    def _register(self, body: dict[str, Any]) -> Answer:
        self.epochs[self.uid] = self.epoch + 1
        self.registrations.append(body)
        self.stored_to = 0
        return 201, {
            "uid": self.uid,
            "number": 1,
            "epoch": self.epoch,
            "token": f"esp_run_{self.epoch}",
            "resumed": self.epoch > 1,
            "command_key": signing.public_key(self.command_key),
            "kernel_key": signing.public_key(self.kernel_key),
            "stream": f"/ws/v1/trainer/{self.uid}",
            "last_command_seq": self.last_command_seq,
            "policy": self.policy.to_wire(),
            "server_time": self.clock() - self.registered_seconds_ago,
            "telemetry_types": self.telemetry_types,
        }

    def _store(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["seq_to"] <= self.stored_to:
            self.duplicates += 1
            return {"stored": 0, "duplicate": True, "slow_down_ms": 0}
        items = len(body["frames"]) + len(body["metrics"]) + len(body["findings"])
        assert body["seq_from"] > self.stored_to, "a number is used twice"
        assert body["seq_to"] - body["seq_from"] + 1 == items
        self.stored_to = body["seq_to"]
        self.batches.append(body)
        return {"stored": items, "duplicate": False, "slow_down_ms": 0}


async def _push_all(waiting: asyncio.Queue[dict[str, Any]], send: Any) -> None:
    while True:
        message = await waiting.get()
        await send({"type": "websocket.send", "text": codec.encode(message).decode()})


def wait_for(condition: Callable[[], object], what: str, seconds: float = 300.0) -> None:
    """Returns once ``condition`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s in vain until {what}")
        time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
