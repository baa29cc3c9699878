"""Reports of an older start of the run do not stand before those of this one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from esper.sdk.transport.journal import Journal
from esper.sdk.transport.outgoing import ReportSender
from esper.sdk.transport.queues import Pace, TransportQueues


class Client:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.sent.append((path, body["epoch"]))
        return {}


def test_they_are_left_out_and_all_others_are_sent_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.start_epoch(run="r1", epoch=2, server="http://s", token="esp_secret")
    for path, epoch in (
        ("runs/r1/commands/1/ack", 1),
        ("runs/r2/finish", 1),  # of another run, whose process has ended
        ("runs/r1/commands/2/ack", 2),
    ):
        journal.add_report(path, {"epoch": epoch})
    client = Client()
    registration = SimpleNamespace(run="r1", epoch=2)
    sender = ReportSender(
        cast(Any, client), cast(Any, registration), journal, TransportQueues(), Pace()
    )
    asyncio.run(sender.send_all())
    assert client.sent == [("runs/r2/finish", 1), ("runs/r1/commands/2/ack", 2)]
    assert list(journal.reports) == []
    journal.close()
