"""A tiny HTTP page for probes: ``/healthz`` and ``/`` (status as JSON). Read only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from esper.contracts import codec

_MAX_LINE = 4096
_TIMEOUT_SECONDS = 5.0


async def serve_status(
    host: str, port: int, status: Callable[[], dict[str, Any]]
) -> asyncio.Server:
    """Listen; raises ``OSError`` when the port is taken."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                request = await reader.readline()
                while (await reader.readline()).strip():
                    pass  # no header is needed
                writer.write(_answer(request, status))
                await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, host, port, limit=_MAX_LINE)


def _answer(request: bytes, status: Callable[[], dict[str, Any]]) -> bytes:
    method, _, rest = request.partition(b" ")
    path = rest.partition(b" ")[0]
    if method != b"GET":
        return _response(b"405 Method Not Allowed", {"error": "GET only"})
    if path == b"/healthz":
        return _response(b"200 OK", {"status": "ok"})
    if path in (b"/", b"/status"):
        return _response(b"200 OK", status())
    return _response(b"404 Not Found", {"error": "/healthz or /status"})


def _response(line: bytes, body: dict[str, Any]) -> bytes:
    content = codec.encode(body)
    return (
        b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
        b"Cache-Control: no-store\r\nConnection: close\r\n\r\n%b" % (line, len(content), content)
    )
