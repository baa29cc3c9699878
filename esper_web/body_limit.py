"""Limits the size and the duration of request bodies.

Django reads a whole body before it authenticates the sender, into a temporary file and without a
time limit. This runs before Django, so that no client can fill the disk or occupy the connections.
"""

from __future__ import annotations

import asyncio
from typing import Any

from esper.contracts import codec

MAX_BODY_BYTES = 2 * 1024 * 1024  # the API itself takes less
MAX_BODY_SECONDS = 30.0


class _RefusedBodyError(Exception):
    """``status``, ``code`` and ``detail`` of the problem document that answers it."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail


class BodyLimit:
    """ASGI middleware for ``http``: the application gets the complete body, or no request.

    Args:
        max_bytes, max_seconds: 413 and 408 beyond them.
    """

    def __init__(
        self,
        application: Any,
        *,
        max_bytes: int = MAX_BODY_BYTES,
        max_seconds: float = MAX_BODY_SECONDS,
    ) -> None:
        self._application = application
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            _check_announced(scope, self._max_bytes)
            async with asyncio.timeout(self._max_seconds):
                first = await _whole_body(receive, self._max_bytes)
        except TimeoutError:
            late = f"The body did not arrive within {self._max_seconds:g} s."
            await _refuse(send, _RefusedBodyError(408, "too-slow", late))
            return
        except _RefusedBodyError as error:
            await _refuse(send, error)
            return
        waiting = [first]

        async def replay() -> Any:
            return waiting.pop() if waiting else await receive()

        await self._application(scope, replay, send)


def _check_announced(scope: Any, max_bytes: int) -> None:
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if announced.isdigit() and (len(announced) > 12 or int(announced) > max_bytes):
        raise _too_large(max_bytes)


async def _whole_body(receive: Any, max_bytes: int) -> dict[str, Any]:
    """One ``http.request`` message, or ``http.disconnect``."""
    parts: list[bytes] = []
    size = 0
    while True:
        message: dict[str, Any] = await receive()
        if message["type"] != "http.request":
            return message
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}


def _too_large(max_bytes: int) -> _RefusedBodyError:
    return _RefusedBodyError(413, "too-large", f"A body may have {max_bytes} bytes.")


async def _refuse(send: Any, error: _RefusedBodyError) -> None:
    content = codec.encode(
        {
            "type": f"/api/docs/problems#{error.code}",
            "title": "Content Too Large" if error.status == 413 else "Request Timeout",
            "status": error.status,
            "detail": error.detail,
            "code": error.code,
            "errors": [],
        }
    )
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),  # the rest of the body is not read
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
