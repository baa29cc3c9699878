"""The trainer's connection to the server: one daemon thread that training never waits for.

register -> hello -> ┬ telemetry, batch by batch, each until it is answered
                     ├ reports (acknowledgements, rollbacks, remedies), each until it is answered
                     └ commands into the inbox
close    -> the rest of the telemetry -> the rest of the reports -> finish

A server whose database was restored from a backup has lost a part of this: the run registers again,
and its hello says what the model holds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from esper.contracts import wire
from esper.contracts.protocol import Continued, Finish, Hello, HelloAnswer
from esper.exceptions import CodecError, TransportError
from esper.fail_closed import short
from esper.sdk.transport.client import Client, insist
from esper.sdk.transport.commands import LocalVeto
from esper.sdk.transport.journal import Journal, state_directory
from esper.sdk.transport.listening import Listener, Preparation
from esper.sdk.transport.outgoing import ReportSender, TelemetrySender, send_leftover_reports
from esper.sdk.transport.queues import Pace, TransportQueues
from esper.sdk.transport.registration import Registration, RunDescription
from esper.sdk.transport.resolving import resolve_in_daemon_threads

logger = logging.getLogger("esper")

_GRACE_SECONDS = 2.0  # for the thread to write its journal when it must stop
_SHORT_SECONDS = 0.4  # the same, and the wait for a server that does not answer


class Transport:
    """Everything that crosses the network for one session.

    Args:
        server, token: where, and the right to create runs.
        queues: what the training thread puts in and takes out.
        veto: the trainer's own limits on commands.
        preparation: makes commands ready for the step boundary.
    """

    def __init__(
        self,
        server: str,
        token: str,
        queues: TransportQueues,
        *,
        veto: LocalVeto,
        preparation: Preparation,
        pace: Pace,
    ) -> None:
        self.queues = queues
        self._server = server
        self._token = token
        self._veto = veto
        self._preparation = preparation
        self._pace = pace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._client: Client | None = None
        self._sender: TelemetrySender | None = None
        self._report_sender: ReportSender | None = None
        self._taken = ("", 0)  # a run, and the last command of it that was taken
        queues.on_report = self._wake_reports

    # -- the training thread's side: nothing here waits, but close -------------------------------

    def start(self, description: RunDescription) -> None:
        """Begin to register, in the background."""
        self._thread = threading.Thread(
            target=self._run, args=(description,), name="esper-transport", daemon=True
        )
        self._thread.start()

    @property
    def registration(self) -> Registration | None:
        """None until the server has answered."""
        return self.queues.registration

    def send_soon(self) -> None:
        """Send the telemetry now, before the next flush."""
        if self._sender is not None:
            self._call_in_loop(self._sender.wake.set)

    def close(self, finish: Callable[[int], Finish], *, timeout: float) -> None:
        """Send what waits, and how the run ended.

        What is not answered within ``timeout`` seconds stays in the journal. The next session on
        this machine sends it. There is hardly a wait for a server that did not answer the last
        request.
        """
        self.queues.finish = finish
        thread = self._thread
        if thread is None:
            return
        self.send_soon()
        self._wake_reports()
        if self._client is not None and self._client.answers is False:
            timeout = min(timeout, _SHORT_SECONDS)
        thread.join(timeout)
        if thread.is_alive() and self._task is not None:
            self._call_in_loop(self._task.cancel)
            thread.join(_GRACE_SECONDS if timeout > _SHORT_SECONDS else _SHORT_SECONDS)

    def _wake_reports(self) -> None:
        if self._report_sender is not None:
            self._call_in_loop(self._report_sender.wake.set)

    def _call_in_loop(self, callback: Callable[[], object]) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # it has just been closed
                loop.call_soon_threadsafe(callback)

    # -- the transport thread ------------------------------------------------------------------

    def _run(self, description: RunDescription) -> None:
        try:
            asyncio.run(self._live(description))
        except Exception as error:
            logger.error(
                "Esper's transport stopped (%s); training goes on without it", short(error)
            )
            logger.debug("the transport's error", exc_info=error)

    async def _live(self, description: RunDescription) -> None:
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        resolve_in_daemon_threads(self._loop)
        client = self._client = Client(self._server, self._token)
        try:
            registration = await self._register(client, description)
            while not await self._live_registered(client, registration, description):
                registration = await self._register(client, description, before=registration)
        except TransportError as error:
            self._give_up(error)
        except asyncio.CancelledError:
            # Where the server never answered, this was said before.
            said = self.registration is None and client.answers is False
            logger.log(
                logging.INFO if said else logging.WARNING,
                "closed before the server had answered everything; %s",
                self.queues.ledger(),
            )
        finally:
            self._loop = None
            await client.close()

    async def _live_registered(
        self, client: Client, registration: Registration, description: RunDescription
    ) -> bool:
        """Until the run ends; False when the server has lost the registration, and it goes on."""
        client.token = registration.token
        journal = await self._open_journal(registration)
        report_sender = ReportSender(client, registration, journal, self.queues, self._pace)
        self.queues.registration, self._report_sender = registration, report_sender
        logger.info("run %s is registered at %s", description.name, self._server)
        try:
            await self._say_hello(client, registration, description, journal)
            await self._serve(client, registration, journal, report_sender)
            report_sender.write_finish()
            await report_sender.send_all()
            logger.info("run finished; %s", self.queues.ledger())
            return True
        except TransportError as error:
            if not _registration_may_be_lost(error):
                raise
            logger.warning("%s: registering the run again", error)
            self._taken = (registration.run, journal.state.command_seq)
            return False
        except asyncio.CancelledError:
            report_sender.write_finish()
            raise
        finally:
            journal.close()

    async def _register(
        self, client: Client, description: RunDescription, *, before: Registration | None = None
    ) -> Registration:
        """``before``: the registration that the server accepts no more; the run goes on."""
        client.token = self._token
        continues = Continued(run=before.run, epoch=before.epoch) if before else None
        body, key = wire.to_wire(description.message(continues)), str(uuid.uuid4())

        async def attempt() -> Registration:
            answer = await client.post("runs", body, key=key)
            try:
                return Registration.from_wire(answer)
            except CodecError as error:
                raise TransportError(f"runs: {error}", permanent=True) from error

        return await insist(attempt, back_off=self._pace.back_off(), what="registering the run")

    async def _open_journal(self, registration: Registration) -> Journal:
        directory = state_directory() / registration.run
        while True:  # a process that this one replaces may still hold it
            try:
                journal = Journal(directory)
                break
            except BlockingIOError:
                await asyncio.sleep(self._pace.first_retry)
        journal.start_epoch(
            run=registration.run,
            epoch=registration.epoch,
            server=self._server,
            token=registration.token,
        )
        run, seq = self._taken
        if run == registration.run and seq > journal.state.command_seq:
            journal.take_command(seq)  # the former registration's journal may have been deleted
        return journal

    async def _say_hello(
        self,
        client: Client,
        registration: Registration,
        description: RunDescription,
        journal: Journal,
    ) -> None:
        hello = Hello(
            epoch=registration.epoch,
            step=description.step,
            applied=description.applied(),
            remedies=description.remedies(),
            last_command_seq=journal.state.command_seq,
        )
        path, body = f"runs/{registration.run}/hello", wire.to_wire(hello)

        async def attempt() -> tuple[float, HelloAnswer]:
            return time.time(), await client.ask(path, body, HelloAnswer)

        sent, answer = await insist(attempt, back_off=self._pace.back_off(), what="hello")
        self._set_clock(registration, answer, sent)
        for entry in answer.settled:
            self.queues.settled.append((entry.adaptation, entry.state))

    def _set_clock(self, registration: Registration, answer: HelloAnswer, sent: float) -> None:
        """Takes the server's time from an answer that no earlier attempt can have made.

        A registration whose answer was lost is answered again with the time of the first attempt,
        and a clock that is late takes commands that have expired. The answer was made after the
        request was sent, so this clock is early rather than late.

        Args:
            sent: by our clock, when the attempt began that was answered.
        """
        if answer.server_time is not None:
            offset = answer.server_time - sent
            self.queues.registration = msgspec.structs.replace(registration, clock_offset=offset)

    async def _serve(
        self,
        client: Client,
        registration: Registration,
        journal: Journal,
        report_sender: ReportSender,
    ) -> None:
        """Until the run ends and everything except the finish was answered."""
        self._sender = TelemetrySender(client, registration, self.queues, self._pace)
        listener = Listener(
            client,
            registration,
            journal,
            self.queues,
            self._pace,
            veto=self._veto,
            preparation=self._preparation,
        )
        ending = {asyncio.create_task(report_sender.run()), asyncio.create_task(self._sender.run())}
        endless = {
            asyncio.create_task(listener.run()),
            asyncio.create_task(send_leftover_reports(self._server, self._pace)),
        }
        await _until_done(ending, endless)

    def _give_up(self, error: TransportError) -> None:
        logger.error(
            "Esper no longer reports this run: %s. %s Training goes on; %s",
            str(error).rstrip("."),  # a server's detail is a sentence, other errors are not
            _advice(error, registered=self.registration is not None),
            self.queues.ledger(),
        )


async def _until_done(ending: set[asyncio.Task[Any]], endless: set[asyncio.Task[Any]]) -> None:
    """Wait for ``ending``; the first error of any task ends all."""
    running = ending | endless
    try:
        while not all(task.done() for task in ending):
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in ending | endless:
            task.cancel()
        await asyncio.gather(*ending, *endless, return_exceptions=True)


def _registration_may_be_lost(error: TransportError) -> bool:
    """A restored database has lost the registration; or another process has replaced this one.

    A registration that continues the run tells the two apart.
    """
    return error.permanent and (error.code == "run-restored" or error.status in (401, 404))


def _advice(error: TransportError, *, registered: bool) -> str:
    if error.code == "old-epoch":
        return "Another process has attached a run of the same name and replaced this one."
    if error.status == 401 and registered:  # from then on it uses the run's own token
        return "Another process has attached a run of the same name, or its token was revoked."
    if error.code == "run-ended":
        return "The server has closed the run."
    if error.status in (401, 403):
        return "Check ESPER_TOKEN: it needs the scope runs:create and must not be revoked."
    if error.status == 404:
        return "Check ESPER_SERVER, and that the run was not deleted."
    return "Server and trainer do not understand each other: compare their versions of Esper."
