"""What goes to the server for one registered run: telemetry batches and reports."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any

from esper.contracts import telemetry_body, wire
from esper.contracts.protocol import Answer, RemedyAnswer, TelemetryAnswer
from esper.exceptions import CodecError, TransportError
from esper.sdk.transport.client import Client, insist
from esper.sdk.transport.journal import JOURNAL_FILE, Journal, StoredReport, state_directory
from esper.sdk.transport.queues import Pace, PendingReport, ProposalAnswer, TransportQueues
from esper.sdk.transport.registration import Registration
from esper.sdk.transport.telemetry import Batch

logger = logging.getLogger("esper")
NOT_AWAITED = ("/remedy-proposals", "/remedy-verdicts", "/finish")  # the last: after all others


class TelemetrySender:
    """Sends batch after batch, each until it is answered; ends when the run does."""

    def __init__(
        self, client: Client, registration: Registration, queues: TransportQueues, pace: Pace
    ) -> None:
        self.wake = asyncio.Event()
        self._client = client
        self._path = f"runs/{registration.run}/telemetry"
        self._epoch = registration.epoch
        # An older server takes JSON only.
        self._raw = telemetry_body.MEDIA_TYPE in registration.telemetry_types
        self._queues = queues
        self._pace = pace
        self._slow_down_until = 0.0

    async def run(self) -> None:
        """Raises ``TransportError`` when the server accepts nothing more of this run."""
        queue = self._queues.telemetry
        while True:
            closing = self._queues.closing
            batch = queue.take(self._epoch)
            if batch is not None:
                await self._send(batch)
            elif closing:
                return
            if not closing:
                await asyncio.sleep(self._pause_seconds())
            if not closing and not queue.crowded:
                await wait_for_event(self.wake, self._pace.flush)

    async def _send(self, batch: Batch) -> None:
        queue = self._queues.telemetry
        try:
            content, media_type = batch.content(raw=self._raw)
        except CodecError as error:
            queue.settle_dropped(batch)
            logger.error("%d telemetry items cannot be sent: %s", batch.items, error)
            return
        try:
            answer = await insist(
                partial(self._client.ask_with, self._path, content, media_type, TelemetryAnswer),
                back_off=self._pace.back_off(),
                what="telemetry",
            )
        except TransportError as error:
            queue.settle_dropped(batch)
            if ends_the_run(error):
                raise
            logger.error("the server refused %d telemetry items: %s", batch.items, error)
            return
        except asyncio.CancelledError:
            queue.settle_dropped(batch)
            raise
        queue.settle_stored(batch)
        self._slow_down_until = time.monotonic() + answer.slow_down_ms / 1000

    def _pause_seconds(self) -> float:
        return max(self._pace.least_gap, self._slow_down_until - time.monotonic())


class ReportSender:
    """Writes pending reports to the journal and sends them, each until it is answered.

    In order, but what the server waits for (answers to commands, rollbacks) goes before what it
    does not (proposed remedies, their verdicts): an adaptation is in doubt until it is answered.
    """

    def __init__(
        self,
        client: Client,
        registration: Registration,
        journal: Journal,
        queues: TransportQueues,
        pace: Pace,
    ) -> None:
        self.wake = asyncio.Event()
        self._client = client
        self._run = f"runs/{registration.run}"
        self._epoch = registration.epoch
        self._journal = journal
        self._queues = queues
        self._pace = pace
        self._finish_written = False

    async def run(self) -> None:
        """Until the run ends; raises ``TransportError`` when the server accepts nothing more."""
        while True:
            closing = self._queues.closing
            await self.send_all()
            if closing and not self._queues.reports:
                return
            await wait_for_event(self.wake, self._pace.flush)

    async def send_all(self) -> None:
        """Send reports until none is pending; one that is queued meanwhile is sent, too."""
        while report := self._next():
            if self._of_an_older_start(report):
                logger.debug("%s is of an older start of this run: not sent", report.path)
                self._journal.remove_report(report)
            else:
                await self._send(report)

    def _next(self) -> StoredReport | None:
        self.write_to_journal()
        reports = self._journal.reports
        awaited = (report for report in reports if not report.path.endswith(NOT_AWAITED))
        return next(awaited, reports[0] if reports else None)

    def _of_an_older_start(self, report: StoredReport) -> bool:
        """The server refuses it, and on a slow server the answers of this start would wait for it.

        What this model holds was said by ``hello``.
        """
        epoch = report.body.get("epoch", self._epoch)
        return bool(report.path.startswith(f"{self._run}/") and epoch < self._epoch)

    def write_to_journal(self) -> None:
        """Move reports from memory to the journal, where they outlive this process."""
        while self._queues.reports:
            report = self._queues.reports.popleft()
            try:
                message = report.build(self._epoch)
                body = message.to_wire() if isinstance(message, Answer) else wire.to_wire(message)
            except CodecError as error:
                logger.warning("%s is not reported: %s", report.path, error)
                continue
            self._journal.add_report(f"{self._run}/{report.path}", body)

    def write_finish(self) -> None:
        """The last report of a run, once."""
        if self._queues.finish is not None and not self._finish_written:
            self._finish_written = True
            self._queues.reports.append(PendingReport("finish", self._queues.finish))
        self.write_to_journal()

    async def _send(self, report: StoredReport) -> None:
        try:
            answer = await insist(
                partial(self._client.post, report.path, report.body),
                back_off=self._pace.back_off(),
                what=report.path,
            )
        except TransportError as error:
            self._on_refusal(report, error)
        else:
            self._on_answer(report, answer)
        self._journal.remove_report(report)

    def _on_refusal(self, report: StoredReport, error: TransportError) -> None:
        """Raises the error where it ends the run."""
        mine = report.body.get("epoch") == self._epoch
        proposes = _proposes(report)
        # An older server does not know these addresses; a restored database may lack the command.
        # Whether it lacks the run, others find out.
        lost = error.status == 404 and (
            proposes or report.path.endswith(("/remedy-verdicts", "/ack"))
        )
        if mine and ends_the_run(error) and error.code != "run-ended" and not lost:
            raise error
        if proposes:
            self._queues.proposal_answers.append(
                ProposalAnswer(str(report.body["key"]), refusal=str(error), code=error.code)
            )
        level = logging.DEBUG if error.code == "gate-closed" else logging.WARNING
        logger.log(level, "the server refused %s: %s", report.path, error)

    def _on_answer(self, report: StoredReport, answer: dict[str, Any]) -> None:
        if not _proposes(report):
            return
        try:
            read = wire.from_wire(RemedyAnswer, answer)
        except CodecError as error:
            logger.warning("%s: %s", report.path, error)
            return
        self._queues.proposal_answers.append(ProposalAnswer(str(report.body["key"]), read))


def _proposes(report: StoredReport) -> bool:
    return report.path.endswith("/remedy-proposals")


async def send_leftover_reports(server: str, pace: Pace) -> None:
    """Send the reports of runs that ended while this server could not be reached."""
    for path in sorted(state_directory().glob(f"*/{JOURNAL_FILE}")):
        try:
            journal = Journal(path.parent)
        except OSError:
            continue  # its own process is alive
        try:
            if journal.state.server == server:
                await _send_all(journal, pace)
        finally:
            journal.close()


async def _send_all(journal: Journal, pace: Pace) -> None:
    client = Client(journal.state.server, journal.state.token)
    try:
        for report in journal.reports:
            attempt = partial(client.post, report.path, report.body)
            try:
                await insist(attempt, back_off=pace.back_off(), what=report.path)
            except TransportError as error:
                logger.warning("the server refused %s: %s", report.path, error)
            journal.remove_report(report)
    finally:
        await client.close()


def ends_the_run(error: TransportError) -> bool:
    """True when the server accepts nothing more of this start of the run."""
    ended = error.code in ("old-epoch", "run-ended", "run-restored")
    return error.permanent and (ended or error.status in (401, 403, 404))


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Until it is set, at most so long; it is clear afterwards."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
    event.clear()
