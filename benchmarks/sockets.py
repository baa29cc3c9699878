"""A thousand browsers' sockets: from the event's commit to its frame, and whether any is lost.

``python -m benchmarks.sockets [--sockets 1000] [--events 30] [--json FILE]``

Sockets of signed-in people watch the inbox of an Esper as ``./up`` starts it. Events are committed
by this process, a person approves adaptations meanwhile, and every socket must get every event of
the inbox in order. The client's own work for all these sockets is part of the times, on the same
cores. Returns 1 when an event was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.figures import Budget, Figure, show, write_json
from benchmarks.installation import Installation, installation, machine
from benchmarks.waiting import Approver, propose, sign_in, use_database_of
from esper.contracts import codec

BUDGET = Budget("p99", 500.0, "ms")
TOPIC = "inbox"
PEOPLE = ("vera", "rafi", "olga", "carl", "ada")
OPENED_AT_ONCE = 50
MEASURED = "benchmark.event"
PATIENCE_SECONDS = 120.0


@dataclass
class Browser:
    """One socket and what came through it."""

    socket: ClientConnection
    begin: int = 0
    seen: list[int] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)

    async def read(self) -> None:
        async for text in self.socket:
            message = codec.decode(text)
            if message.get("topic") == TOPIC and "seq" in message and "type" in message:
                self.seen.append(message["seq"])
                if message["type"] == MEASURED:
                    self.late_ms.append((time.time() - message["data"]["committed"]) * 1e3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; returns 1 when a socket lacks an event."""
    options = _parse(arguments)
    with installation() as esper:
        use_database_of(esper)
        uids = propose(options.approvals)
        browsers, newest, approvals, used = asyncio.run(_measure(esper, uids, options))
        memory = esper.resident_mib("web")
    late = tuple(value for browser in browsers for value in browser.late_ms)
    lost = sum(missing(browser, newest) for browser in browsers)
    figures = [
        Figure("socket_frame", BUDGET, late, f"commit -> frame, {len(browsers)} sockets"),
        Figure("approval", Budget("p95", 300.0, "ms"), tuple(approvals.answered_ms), "meanwhile"),
    ]
    print(show(figures))
    events = newest - min(browser.begin for browser in browsers)
    print(
        f"{events} events of the inbox x {len(browsers)} sockets: {lost} frames lost; "
        f"{len(approvals.answered_ms)} approvals, {len(approvals.refused)} refused"
    )
    per_frame = used / max(1, sum(len(browser.seen) for browser in browsers)) * 1e6
    print(f"web process: {used:.1f} s CPU, {per_frame:.0f} microseconds a frame, {memory:.0f} MiB")
    print(machine())
    if options.json:
        write_json(figures, options.json)
    return 1 if lost else 0


def missing(browser: Browser, newest: int) -> int:
    """Events after its subscription that the socket did not get, or got out of order."""
    expected = list(range(browser.begin + 1, newest + 1))
    if browser.seen == expected:
        return 0
    return max(1, len(set(expected) - set(browser.seen)))


async def _measure(
    esper: Installation, uids: list[str], options: argparse.Namespace
) -> tuple[list[Browser], int, Approver, float]:
    """The sockets, the last event, the person, and the CPU seconds of the web process."""
    cookies = [await asyncio.to_thread(_cookie, esper, name) for name in PEOPLE]
    browsers: list[Browser] = []
    while len(browsers) < options.sockets:
        count = min(OPENED_AT_ONCE, options.sockets - len(browsers))
        opened = (_open(esper, cookies[index % len(cookies)]) for index in range(count))
        browsers += await asyncio.gather(*opened)
    reading = [asyncio.create_task(browser.read()) for browser in browsers]
    approvals = Approver(esper, uids, pause_seconds=0.3)
    before = esper.cpu_seconds()["web"]
    approvals.start()
    for _ in range(options.events):
        await asyncio.to_thread(_commit_event)
        await asyncio.sleep(0.5)
    await asyncio.to_thread(approvals.finish)
    newest = await asyncio.to_thread(_last_seq)
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and any(not one.seen or one.seen[-1] < newest for one in browsers):
        await asyncio.sleep(0.1)
    used = esper.cpu_seconds()["web"] - before
    for task in reading:
        task.cancel()
    await asyncio.gather(*(browser.socket.close() for browser in browsers), return_exceptions=True)
    return browsers, newest, approvals, used


def _cookie(esper: Installation, name: str) -> str:
    with httpx.Client(base_url=esper.url, timeout=60.0) as http:
        sign_in(http, name, esper.password(name))
        return f"sessionid={http.cookies['sessionid']}"


async def _open(esper: Installation, cookie: str) -> Browser:
    socket = await connect(
        f"{esper.url.replace('http', 'ws', 1)}/ws/v1/stream",
        additional_headers={"Cookie": cookie, "Origin": esper.url},
        open_timeout=60.0,
        ping_interval=None,
    )
    await socket.send(codec.encode({"op": "subscribe", "topic": TOPIC}).decode())
    answer: dict[str, Any] = {"op": "ping"}
    while answer.get("op") == "ping":
        answer = codec.decode(await socket.recv())
    if answer.get("op") != "subscribed":
        raise RuntimeError(f"a socket was refused: {answer}")
    return Browser(socket, begin=int(answer["seq"]))


def _commit_event() -> None:
    from django.db import close_old_connections, transaction

    from apps.notifications.services import publish

    close_old_connections()
    with transaction.atomic():
        event = publish(topic=TOPIC, type=MEASURED, data={})
        # the last statement: what follows is the commit
        event.data["committed"] = time.time()
        event.save(update_fields=["data"])


def _last_seq() -> int:
    from apps.notifications.services import last_seq

    return int(last_seq(TOPIC))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sockets")
    parser.add_argument("--sockets", type=int, default=1000)
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--approvals", type=int, default=30, help="that a person gives meanwhile")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
