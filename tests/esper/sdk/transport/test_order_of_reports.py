"""What is sent first, and what is not sent: what adaptations wait for goes before advice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from esper.contracts import CommandAck, CommandState
from esper.sdk.transport.journal import Journal
from esper.sdk.transport.outgoing import ReportSender
from esper.sdk.transport.queues import Pace, TransportQueues


class Client:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.meanwhile: dict[str, Callable[[], object]] = {}  # by path: done while it is sent

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.sent.append((path, body["epoch"]))
        self.meanwhile.get(path, lambda: None)()
        return {}

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.sent]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    journal.start_epoch(run="r1", epoch=2, server="http://s", token="esp_secret")
    yield journal
    journal.close()


def send(client: Client, journal: Journal, queues: TransportQueues | None = None) -> None:
    registration = SimpleNamespace(run="r1", epoch=2)
    queues = TransportQueues() if queues is None else queues
    sender = ReportSender(cast(Any, client), cast(Any, registration), journal, queues, Pace())
    asyncio.run(sender.send_all())
    assert list(journal.reports) == []


def test_reports_of_an_older_start_are_left_out(journal: Journal) -> None:
    for path, epoch in (
        ("runs/r1/commands/1/ack", 1),
        ("runs/r2/finish", 1),  # of another run, whose process has ended
        ("runs/r1/commands/2/ack", 2),
    ):
        journal.add_report(path, {"epoch": epoch})
    client = Client()
    send(client, journal)
    assert sorted(client.sent) == [("runs/r1/commands/2/ack", 2), ("runs/r2/finish", 1)]


def test_what_an_adaptation_waits_for_does_not_wait_for_advice(journal: Journal) -> None:
    advice = [f"runs/r1/{name}" for name in ("remedy-proposals", "remedy-verdicts", "finish")]
    awaited = [f"runs/r1/{name}" for name in ("commands/1/ack", "rollbacks", "commands/2/ack")]
    for path in (advice[0], awaited[0], advice[1], *awaited[1:], advice[2]):
        journal.add_report(path, {"epoch": 2})
    client = Client()
    send(client, journal)
    assert client.paths == [*awaited, *advice]


def test_an_answer_that_is_queued_later_goes_before_the_advice_that_is_left(
    journal: Journal,
) -> None:
    for _ in range(3):
        journal.add_report("runs/r1/remedy-proposals", {"epoch": 2, "key": "k"})
    client, queues = Client(), TransportQueues()
    ack = CommandAck(seq=7, state=CommandState.APPLIED)
    client.meanwhile["runs/r1/remedy-proposals"] = lambda: (
        None if len(client.sent) > 1 else queues.answer(ack)
    )
    send(client, journal, queues)
    assert client.paths.index("runs/r1/commands/7/ack") == 1
    assert len(client.sent) == 4
