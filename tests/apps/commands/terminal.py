"""The commands of ``esper`` as a person types them, over the real API of these tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
from click.testing import CliRunner, Result
from django.core.handlers.wsgi import WSGIHandler

from launcher.command import cli
from launcher.commands import asking
from launcher.remote.client import Client


@dataclass
class Terminal:
    """Runs commands with one caller's token; ``requests`` holds what they sent."""

    token: str
    requests: list[httpx.Request] = field(default_factory=list)

    def run(self, *words: str, answers: str | None = None) -> Result:
        """The command, with the API of this process in place of a server's."""
        found, asking.connect = asking.connect, self._connect
        try:
            return CliRunner().invoke(cli, list(words), input=answers)
        finally:
            asking.connect = found

    def read(self, *words: str) -> Any:
        """The JSON that a command prints; fails when it does not succeed."""
        result = self.run(*words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def _connect(self, **_: str) -> Client:
        return Client(
            httpx.Client(
                transport=httpx.WSGITransport(app=WSGIHandler(), raise_app_exceptions=False),
                base_url="http://testserver",
                headers={"Authorization": f"Bearer {self.token}"},
                event_hooks={"request": [self.requests.append]},
            )
        )
