"""HTTP to the server: strict JSON, one kind of error, and retries."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from esper.contracts import codec, wire
from esper.exceptions import CodecError, TransportError

logger = logging.getLogger("esper")

# Not the global generator: training uses it. A draw here, in another thread, would change what the
# training does next, and a graft that is certified meanwhile would seem to have drawn.
_RANDOM = random.SystemRandom()

API_PATH = "/api/v1/"
_TIMEOUT = httpx.Timeout(10.0, connect=5.0)
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_T = TypeVar("_T")


def is_loopback(server: str) -> bool:
    """True where a proxy from the environment must not be used."""
    return urlsplit(server).hostname in _LOOPBACK


@dataclass(slots=True)
class BackOff:
    """Waiting times between attempts, in seconds: doubled, capped, with jitter."""

    first: float = 0.2
    most: float = 10.0
    attempts: int = 0

    def next_delay(self, retry_after: float | None = None) -> float:
        delay = min(self.most, self.first * 2.0**self.attempts)
        self.attempts = min(self.attempts + 1, 30)
        jittered = delay * _RANDOM.uniform(0.5, 1.0)
        return max(jittered, min(retry_after or 0.0, 60.0))

    def reset(self) -> None:
        self.attempts = 0


class Client:
    """The server's API for one run.

    Args:
        server: base URL, such as ``http://127.0.0.1:8080``.
        token: bearer token; replaced by the run's own after registration.

    Attributes:
        answers: the last request was answered; None before the first has ended.
    """

    def __init__(self, server: str, token: str) -> None:
        self.server = server.rstrip("/")
        self.token = token
        self.answers: bool | None = None
        tls = urlsplit(server).scheme == "https"
        self._http = httpx.AsyncClient(
            base_url=self.server + API_PATH,
            timeout=_TIMEOUT,
            trust_env=not is_loopback(server),
            verify=tls,  # False spares plain HTTP the 50 ms of loading certificates
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> Any:
        """Decoded JSON.

        Raises:
            TransportError: no answer, or the server refused.
        """
        return _json(await self._send("GET", path))

    async def get_bytes(self, path: str, *, most: int) -> bytes:
        """A file of at most ``most`` bytes; raises ``TransportError``."""
        content = (await self._send("GET", path)).content
        if len(content) > most:
            raise TransportError(f"{path}: {len(content)} bytes, at most {most}", permanent=True)
        return content

    async def post(self, path: str, body: dict[str, Any], *, key: str = "") -> dict[str, Any]:
        """Post strict JSON; ``key`` is the idempotency key of an act. Raises ``TransportError``."""
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Idempotency-Key"] = key
        try:
            content = codec.encode(body)
        except CodecError as error:
            raise TransportError(f"{path}: {error}", permanent=True) from error
        return await self._post(path, content, headers)

    async def ask(self, path: str, body: dict[str, Any], answer: type[_T]) -> _T:
        """Post strict JSON, and read the answer as a message; raises ``TransportError``."""
        return _message(path, answer, await self.post(path, body))

    async def ask_with(self, path: str, content: bytes, media_type: str, answer: type[_T]) -> _T:
        """Post a body of any type, and read the answer as a message; raises ``TransportError``."""
        data = await self._post(path, content, {"Content-Type": media_type})
        return _message(path, answer, data)

    async def _post(self, path: str, content: bytes, headers: dict[str, str]) -> dict[str, Any]:
        answer = _json(await self._send("POST", path, content=content, headers=headers))
        return answer if isinstance(answer, dict) else {}

    async def _send(
        self,
        method: str,
        path: str,
        *,
        content: bytes = b"",
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        all_headers = {**(headers or {}), "Authorization": f"Bearer {self.token}"}
        try:
            response = await self._http.request(
                method, path, content=content or None, headers=all_headers
            )
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            # RuntimeError: the interpreter ends, and starts no more threads.
            self.answers = False
            text = f"{self.server} did not answer: {type(error).__name__} {error}"
            raise TransportError(text.rstrip(), permanent=False) from error
        self.answers = True
        if response.status_code >= 300:
            raise _refusal(path, response)
        return response


async def insist(
    attempt: Callable[[], Awaitable[_T]],
    *,
    back_off: BackOff,
    what: str,
    give_up: Callable[[], bool] = lambda: False,
) -> _T:
    """Repeat ``attempt`` until it is answered.

    Raises:
        TransportError: the server refused for good, or ``give_up`` returned True.
    """
    warned = False
    while True:
        try:
            result = await attempt()
        except TransportError as error:
            if error.permanent or give_up():
                raise
            if not warned:
                logger.warning("%s: %s; training goes on, retrying in the background", what, error)
                warned = True
            await asyncio.sleep(back_off.next_delay(error.retry_after))
        else:
            back_off.reset()
            if warned:
                logger.warning("%s: the server is back", what)
            return result


def _message(path: str, kind: type[_T], data: dict[str, Any]) -> _T:
    try:
        return wire.from_wire(kind, data)
    except CodecError as error:
        raise TransportError(f"{path}: {error}", permanent=False) from error


def _json(response: httpx.Response) -> Any:
    if not response.content:
        return {}
    try:
        return codec.decode(response.content)
    except CodecError as error:
        # A proxy's page with status 200, most likely: the real server may be back soon.
        text = f"{response.request.url.path} did not answer with JSON: {error}"
        raise TransportError(text, permanent=False, status=response.status_code) from error


def _refusal(path: str, response: httpx.Response) -> TransportError:
    status = response.status_code
    problem: dict[str, Any] = {}
    try:
        decoded = codec.decode(response.content)
        problem = decoded if isinstance(decoded, dict) else {}
    except CodecError:
        pass
    detail = problem.get("detail") or problem.get("title") or response.reason_phrase
    return TransportError(
        f"{path}: {status} {detail}",
        permanent=status not in _TRY_AGAIN,
        retry_after=_seconds(response.headers.get("Retry-After", "")),
        status=status,
        code=str(problem.get("code", "")),
    )


def _seconds(text: str) -> float | None:
    try:
        return max(0.0, float(text))
    except ValueError:
        return None
