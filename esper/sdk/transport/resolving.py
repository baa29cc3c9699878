"""Names of servers become addresses in daemon threads.

The event loop's own way is its executor, whose threads the interpreter waits for at its end: a name
server that does not answer would hold up a script that was interrupted, for many seconds.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress
from typing import Any


def resolve_in_daemon_threads(loop: asyncio.AbstractEventLoop) -> None:
    """From now on, ``loop.getaddrinfo`` starts a thread that nobody waits for at the end."""

    async def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
        answer: asyncio.Future[Any] = loop.create_future()
        thread = threading.Thread(
            target=_resolve, args=(loop, answer, host, port, options), daemon=True
        )
        thread.start()
        return await answer

    loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign]


def _resolve(
    loop: asyncio.AbstractEventLoop,
    answer: asyncio.Future[Any],
    host: Any,
    port: Any,
    options: dict[str, Any],
) -> None:
    found: Any = None
    failure: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, **options)
    except OSError as error:
        failure = error
    with suppress(RuntimeError):  # the loop has been closed meanwhile
        loop.call_soon_threadsafe(_settle, answer, found, failure)


def _settle(answer: asyncio.Future[Any], found: Any, failure: OSError | None) -> None:
    if answer.done():  # cancelled
        return
    if failure is None:
        answer.set_result(found)
    else:
        answer.set_exception(failure)
