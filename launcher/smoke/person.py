"""A person of the smoke run, who uses the same pages and REST API as everybody."""

from __future__ import annotations

import json
import uuid
from typing import Any

import httpx

Json = dict[str, Any]


class SmokeFailure(Exception):
    """The smoke run did not show what it has to show; the message is for a person."""


class Person:
    """Signs in through the page, and uses the REST API with the session cookie."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def sign_in(self, username: str, password: str) -> None:
        """Signs in as a browser does.

        Raises:
            SmokeFailure: the password was refused.
        """
        page = await self._client.get("/login")
        page.raise_for_status()
        form = {
            "username": username,
            "password": password,
            "csrfmiddlewaretoken": self._client.cookies["csrftoken"],
        }
        answer = await self._client.post("/login", data=form)
        if "sessionid" not in self._client.cookies:
            raise SmokeFailure(f"{username} could not sign in (status {answer.status_code})")

    async def get(self, path: str, **parameters: str) -> Json:
        """One resource."""
        answer = await self._client.get(f"/api/v1/{path}", params=parameters)
        answer.raise_for_status()
        found: Json = answer.json()
        return found

    async def all(self, path: str, **parameters: str) -> list[Json]:
        """All pages of a list."""
        page = await self.get(path, limit="200", **parameters)
        found = list(page["results"])
        while page["next"]:
            answer = await self._client.get(page["next"])
            answer.raise_for_status()
            page = answer.json()
            found += page["results"]
        return found

    async def lines(self, path: str) -> list[Json]:
        """An NDJSON export."""
        answer = await self._client.get(f"/api/v1/{path}")
        answer.raise_for_status()
        return [json.loads(line) for line in answer.text.splitlines() if line]

    async def act(self, resource: str, act: str, body: Json) -> httpx.Response:
        """Acts on the present version of a resource: its ETag is sent as If-Match."""
        shown = await self._client.get(f"/api/v1/{resource}")
        shown.raise_for_status()
        return await self._client.post(
            f"/api/v1/{resource}/{act}",
            json=body,
            headers={
                "If-Match": shown.headers["ETag"],
                "Idempotency-Key": str(uuid.uuid4()),
                "X-CSRFToken": self._client.cookies["csrftoken"],
            },
        )
