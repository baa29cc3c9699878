"""A small client of the REST API for commands: one sentence for each error, and an exit status.

A command exits with 0 when it was done, else with one of :class:`Exit`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from urllib.parse import quote

import click
import httpx

API = "/api/v1/"
TIMEOUT_SECONDS = 30.0
PAGE = 200

Json = dict[str, Any]


class Exit(IntEnum):
    """The exit statuses of the commands that ask a server. 2 is click's: wrong usage."""

    DONE = 0
    FAILED = 1  # none of the others
    NOT_ALLOWED = 3  # no token, an unknown one, or not yours to do
    NOT_FOUND = 4
    CONFLICT = 5  # decided already, changed meanwhile, stale, paused or killed
    UNAVAILABLE = 6  # the server is not reachable, or busy
    OUTCOME = 7  # --wait: it ended otherwise than it was asked for
    TIMEOUT = 8  # --wait: it did not end in time


_BY_STATUS = {
    401: Exit.NOT_ALLOWED,
    403: Exit.NOT_ALLOWED,
    404: Exit.NOT_FOUND,
    409: Exit.CONFLICT,
    412: Exit.CONFLICT,
    423: Exit.CONFLICT,
    428: Exit.CONFLICT,
    429: Exit.UNAVAILABLE,
}


class RefusedError(click.ClickException):
    """A request that was refused or could not be sent.

    Attributes:
        exit_code: one of :class:`Exit`.
        problem: the server's problem document (RFC 9457); empty where there was no answer.
    """

    def __init__(self, message: str, status: Exit, problem: Json | None = None) -> None:
        super().__init__(message)
        self.exit_code = int(status)  # type: ignore[misc]  # click declares it for the class
        self.problem = problem or {}

    @property
    def code(self) -> str:
        """The problem's code, such as ``decision-expired``."""
        return str(self.problem.get("code", ""))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request returned; ``etag`` is the version to act on."""

    data: Any
    etag: str = ""
    status: int = 200


class Client:
    """Requests to one server as one caller. Close it, or use it as a context manager."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    @classmethod
    def at(cls, url: str, token: str) -> Client:
        """The client of the server at ``url``."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return cls(httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_SECONDS))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    @property
    def url(self) -> str:
        """The server's address, without a slash at the end."""
        return str(self._http.base_url).rstrip("/")

    def get(self, path: str, **parameters: Any) -> Answer:
        """One resource, such as ``adaptations/A-17``.

        Raises:
            RefusedError: the server refused, or is not reachable.
        """
        given = {name: _text(value) for name, value in parameters.items() if value is not None}
        return self._send("GET", path, params=given)

    def every(self, path: str, *, limit: int | None = None, **parameters: Any) -> Iterator[Json]:
        """The rows of a list, page by page; all of them, or ``limit``."""
        page = self.get(path, limit=min(PAGE, limit or PAGE), **parameters).data
        sent = 0
        while True:
            for row in page["results"]:
                yield row
                sent += 1
                if sent == limit:
                    return
            if not page.get("next"):
                return
            page = self._send("GET", page["next"]).data

    def act(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        etag: str = "",
        dry_run: bool = False,
    ) -> Answer:
        """An act, with a new idempotency key.

        Args:
            etag: of the version that was shown, for acts that need ``If-Match``.
            dry_run: check everything, and change nothing.
        """
        headers = {"Idempotency-Key": str(uuid.uuid4())} | ({"If-Match": etag} if etag else {})
        parameters = {"dry_run": "true"} if dry_run else {}
        return self._send("POST", path, json=dict(body or {}), headers=headers, params=parameters)

    def act_on_shown(
        self, resource: str, act: str, body: Mapping[str, Any] | None = None
    ) -> Answer:
        """An act on the present version of a resource: its ETag is read and sent."""
        return self.act(f"{resource}/{act}", body, etag=self.get(resource).etag)

    def delete(self, path: str) -> None:
        """Remove or revoke a resource."""
        self._send("DELETE", path)

    def lines(self, path: str, **parameters: Any) -> Iterator[bytes]:
        """An export, line by line, without holding it in memory."""
        given = {name: _text(value) for name, value in parameters.items() if value is not None}
        headers = {"Accept": "application/x-ndjson"}
        try:
            with self._http.stream("GET", API + path, params=given, headers=headers) as answer:
                if answer.is_error:
                    answer.read()
                    raise _refusal(answer)
                for line in answer.iter_lines():
                    if line:
                        yield line.encode() + b"\n"
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _send(self, method: str, path: str, **rest: Any) -> Answer:
        address = path if path.startswith(("/", "http")) else API + path
        try:
            answer = self._http.request(method, address, **rest)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if answer.is_error:
            raise _refusal(answer)
        data = answer.json() if answer.content else None
        return Answer(data, answer.headers.get("ETag", ""), answer.status_code)

    def _unreachable(self, error: Exception) -> RefusedError:
        return RefusedError(
            f"{self.url} does not answer ({type(error).__name__}: {error}). "
            "Start Esper with esper up, or name another server with ESPER_URL.",
            Exit.UNAVAILABLE,
        )


def segment(name: str) -> str:
    """A name as one part of a path."""
    return quote(name, safe="")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refusal(answer: httpx.Response) -> RefusedError:
    try:
        problem = answer.json()
        detail = str(problem["detail"])
    except (json.JSONDecodeError, KeyError, TypeError):
        problem, detail = {}, f"The server answered {answer.status_code} to {answer.url}."
    status = _BY_STATUS.get(answer.status_code)
    if status is None:
        status = Exit.UNAVAILABLE if answer.status_code >= 500 else Exit.FAILED
    return RefusedError(detail, status, problem)
