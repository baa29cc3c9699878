"""Bodies that are too large or too slow end before Django reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from esper.contracts import codec
from esper_web.body_limit import BodyLimit

Messages = list[dict[str, Any]]


def chunk(body: bytes, *, last: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": not last}


async def exchange(
    *arriving: dict[str, Any], announced: bytes = b"", hangs: bool = False
) -> tuple[Messages, Messages]:
    """(what the application received, what the client was sent), with at most 10 bytes."""
    seen: Messages = []
    sent: Messages = []
    waiting = list(arriving)

    async def application(_scope: Any, receive: Callable[[], Awaitable[Any]], _send: Any) -> None:
        seen.append(await receive())

    async def receive() -> dict[str, Any]:
        if not waiting and hangs:
            await asyncio.sleep(3600)
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-length", announced)] if announced else []
    limited = BodyLimit(application, max_bytes=10, max_seconds=0.05 if hangs else 300.0)
    await limited({"type": "http", "headers": headers}, receive, send)
    return seen, sent


def refusal(sent: Messages) -> tuple[int, str]:
    start, content = sent
    problem = codec.decode(content["body"])
    assert (b"connection", b"close") in start["headers"]
    assert problem["status"] == start["status"]
    return start["status"], problem["code"]


async def test_a_body_within_the_limit_arrives_whole() -> None:
    seen, sent = await exchange(chunk(b"01234", last=False), chunk(b"56789", last=True))
    assert seen == [chunk(b"0123456789", last=True)]
    assert sent == []


@pytest.mark.parametrize("announced", [b"11", b"104857600", b"9" * 40])
async def test_an_announced_size_is_refused_before_anything_is_read(announced: bytes) -> None:
    seen, sent = await exchange(announced=announced, hangs=True)
    assert seen == []
    assert refusal(sent) == (413, "too-large")


async def test_a_body_of_unannounced_size_is_refused_at_the_limit() -> None:
    seen, sent = await exchange(chunk(b"0123456789", last=False), chunk(b"x", last=False))
    assert seen == []
    assert refusal(sent) == (413, "too-large")


async def test_a_body_that_does_not_come_to_an_end_is_given_up() -> None:
    seen, sent = await exchange(chunk(b"{", last=False), hangs=True)
    assert seen == []
    assert refusal(sent) == (408, "too-slow")


async def test_a_client_that_leaves_is_reported_to_the_application() -> None:
    seen, _ = await exchange(chunk(b"{", last=False), {"type": "http.disconnect"})
    assert seen == [{"type": "http.disconnect"}]
