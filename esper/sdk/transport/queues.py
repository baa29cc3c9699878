"""The queues between the training thread and the transport thread. Neither thread waits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from esper.contracts import Command, CommandAck
from esper.contracts.protocol import Answer, Finish, Message, RemedyAnswer
from esper.sdk.transport.client import BackOff
from esper.sdk.transport.registration import Registration
from esper.sdk.transport.telemetry import TelemetryQueue


@dataclass(frozen=True, slots=True)
class ReadyCommand:
    """A command that was verified and journalled; ``graft`` is what was prepared for it."""

    command: Command
    graft: Any = None


@dataclass(frozen=True, slots=True)
class PendingReport:
    """A message that the server must get, sent again until it is answered.

    Attributes:
        path: below the run.
        build: epoch -> message, called by the transport thread: hashing a model takes longer than
            grafting into it.
    """

    path: str
    build: Callable[[int], Message | Answer]


@dataclass(frozen=True, slots=True)
class WaitingElsewhere:
    """A decision that waits for a person at the server; for the console only."""

    adaptation: str
    layer: str
    blueprint: str


@dataclass(frozen=True, slots=True)
class ProposalAnswer:
    """What the server said of a proposed remedy.

    Attributes:
        key: of the proposal.
        answer: None: it was refused.
        refusal: why.
        code: of the refusal.
    """

    key: str
    answer: RemedyAnswer | None = None
    refusal: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often to send and how long to wait between attempts, in seconds."""

    flush: float = 0.5  # metrics are collected for so long; a frame wakes the sender
    least_gap: float = 0.1  # between two batches
    first_retry: float = 0.2
    longest_retry: float = 10.0

    def back_off(self, longest: float = 60.0) -> BackOff:
        return BackOff(first=self.first_retry, most=min(longest, self.longest_retry))


@dataclass(slots=True)
class TransportQueues:
    """Queues in both directions.

    Attributes:
        telemetry: waits to be sent.
        reports: wait to be written to the journal and sent.
        inbox: commands for the next step boundary.
        waiting: decisions that wait for a person at the server, not said yet.
        settled: (adaptation, state) that the server answered to hello.
        proposal_answers: to proposed remedies.
        pending: numbers of commands that were accepted and are not answered yet.
        finish: epoch -> how the run ended; None while it goes on.
        registration: None until the server has answered.
        on_report: called, in any thread, when a report was queued.
    """

    telemetry: TelemetryQueue = field(default_factory=TelemetryQueue)
    reports: deque[PendingReport] = field(default_factory=deque)
    inbox: deque[ReadyCommand] = field(default_factory=deque)
    waiting: deque[WaitingElsewhere] = field(default_factory=lambda: deque(maxlen=100))
    settled: deque[tuple[str, str]] = field(default_factory=deque)
    proposal_answers: deque[ProposalAnswer] = field(default_factory=deque)
    pending: set[int] = field(default_factory=set)
    finish: Callable[[int], Finish] | None = None
    registration: Registration | None = None
    on_report: Callable[[], None] = lambda: None

    @property
    def closing(self) -> bool:
        return self.finish is not None

    def now(self) -> float:
        """Seconds since the epoch by the server's clock."""
        offset = self.registration.clock_offset if self.registration else 0.0
        return time.time() + offset

    def answer(
        self, ack: CommandAck, *, final: bool = True, rest: Callable[[], dict[str, Any]] = dict
    ) -> None:
        """Queue the acknowledgement of a command; ``rest``: more members, computed later."""
        if final:
            self.pending.discard(ack.seq)
        members = {member.name: getattr(ack, member.name) for member in fields(ack)}
        self.queue_report(
            PendingReport(
                f"commands/{ack.seq}/ack",
                lambda epoch: Answer(epoch=epoch, **{**members, **rest()}),
            )
        )

    def queue_report(self, report: PendingReport) -> None:
        """Send it until it is answered."""
        self.reports.append(report)
        self.on_report()

    def ledger(self) -> str:
        queue = self.telemetry
        return (
            f"telemetry: {queue.offered} offered, {queue.stored} stored, {queue.dropped} dropped, "
            f"{len(queue)} waiting"
        )
