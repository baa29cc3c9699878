"""The trainer's line to the server: one daemon thread that the training never waits for.

register -> hello -> ┬ send telemetry batches until each is answered
                     ├ keep promises (acknowledgements, rollbacks) until each is answered
                     └ listen: command -> verify -> journal -> accept -> prepare -> inbox
close    -> the rest of the telemetry -> the rest of the promises -> finish
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from esper.compilation.verify import open_kernel
from esper.contracts import (
    Command,
    CommandAck,
    CommandKind,
    CommandState,
    Recipe,
    RefusalCode,
    codec,
)
from esper.contracts.kernels import MAX_FILE_BYTES
from esper.exceptions import (
    CodecError,
    CommandRefusedError,
    KernelDigestError,
    SignatureError,
    TransportError,
)
from esper.sdk.client import BackOff, Client, insist, is_loopback
from esper.sdk.commands import LocalVeto, parse_command, verify_command
from esper.sdk.journal import JOURNAL_FILE, Journal, Promise, state_directory
from esper.sdk.kernels import fetch_kernel
from esper.sdk.registration import Registration, RunDescription
from esper.sdk.telemetry import Batch, TelemetryQueue

logger = logging.getLogger("esper")

_T = TypeVar("_T")

_SILENCE_SECONDS = 30.0  # the server pings every 10 s
_MAX_MESSAGE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class ReadyCommand:
    """A command that was verified and journalled; ``graft`` is what was prepared for it."""

    command: Command
    graft: Any = None


@dataclass(frozen=True, slots=True)
class Pace:
    """How often and how patiently, in seconds."""

    flush: float = 0.5  # metrics wait this long for company; a frame wakes the sender
    least_gap: float = 0.1  # between two batches
    first_retry: float = 0.2
    longest_retry: float = 10.0

    def back_off(self) -> BackOff:
        return BackOff(first=self.first_retry, most=self.longest_retry)


class Transport:
    """Everything that crosses the network for one session.

    Args:
        server, token: where, and the right to create runs.
        veto: the trainer's own limits on commands.
        prepare: ``(command, recipe) -> prepared graft``, called in the transport thread; raises
            ``CommandRefusedError``.
    """

    def __init__(
        self,
        server: str,
        token: str,
        *,
        veto: LocalVeto,
        prepare: Callable[[Command, Recipe], Any],
        pace: Pace | None = None,
    ) -> None:
        self.telemetry = TelemetryQueue()
        self.inbox: deque[ReadyCommand] = deque()  # the training thread takes from here
        self.settled: deque[tuple[str, str]] = deque()  # (adaptation, state) from hello
        self.registration: Registration | None = None
        self.problem = ""  # why the run is no longer reported, empty while it is
        self._server = server
        self._client_token = token
        self._veto = veto
        self._prepare = prepare
        self._pace = pace or Pace()
        self._owed: deque[tuple[str, dict[str, Any]]] = deque()
        self._pending: set[int] = set()  # accepted, not yet done
        self._finish: dict[str, Any] | None = None
        self._finish_promised = False
        self._slow_down_until = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._new_telemetry = asyncio.Event()
        self._new_promise = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._journal: Journal | None = None

    # -- the training thread's side: none of these waits ---------------------------------------

    def start(self, description: RunDescription) -> None:
        """Begin to register, in the background."""
        self._thread = threading.Thread(
            target=self._run, args=(description,), name="esper-transport", daemon=True
        )
        self._thread.start()

    @property
    def started(self) -> bool:
        return self._thread is not None

    def now(self) -> float:
        """Seconds since the epoch by the server's clock."""
        offset = self.registration.clock_offset if self.registration else 0.0
        return time.time() + offset

    def send_soon(self) -> None:
        """Something waits that should not wait for the next flush."""
        self._call_in_loop(self._new_telemetry.set)

    def answer(self, ack: CommandAck) -> None:
        """The end of a command, to be told until it is heard."""
        self._pending.discard(ack.seq)
        self.owe(f"commands/{ack.seq}/ack", ack.to_wire())

    def owe(self, path: str, body: dict[str, Any]) -> None:
        """Promise ``POST runs/{uid}/<path>``; the epoch is added."""
        self._owed.append((path, body))
        self._call_in_loop(self._new_promise.set)

    def close(self, finish: dict[str, Any], *, timeout: float) -> bool:
        """Send what waits, say how the run ended; True when all of it was answered in time."""
        thread = self._thread
        if thread is None:
            return True
        self._finish = finish
        self._call_in_loop(self._new_telemetry.set)
        self._call_in_loop(self._new_promise.set)
        thread.join(timeout)
        if thread.is_alive() and self._task is not None:
            self._call_in_loop(self._task.cancel)
            thread.join(2.0)
        return not self.problem and not self._owed and not len(self.telemetry)

    def _call_in_loop(self, callback: Callable[[], object]) -> None:
        loop = self._loop
        if loop is None:
            return
        with suppress(RuntimeError):  # the loop has just been closed
            loop.call_soon_threadsafe(callback)

    # -- the transport thread ------------------------------------------------------------------

    def _run(self, description: RunDescription) -> None:
        try:
            asyncio.run(self._live(description))
        except asyncio.CancelledError:
            pass
        except Exception:
            self.problem = "internal error"
            logger.exception("Esper's transport stopped; training goes on without it")

    async def _live(self, description: RunDescription) -> None:
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        client = Client(self._server, self._client_token)
        try:
            await self._take_up(client, description)
            await self._serve(client)
            await self._say_finish(client)
        except TransportError as error:
            self._give_up(error)
        except asyncio.CancelledError:
            logger.warning("closed before the server had answered everything; %s", self._ledger())
        finally:
            self._leave_journal()
            self._loop = None
            await client.close()

    async def _take_up(self, client: Client, description: RunDescription) -> None:
        registration = await self._register(client, description)
        client.token = registration.token
        self._journal = await self._open_journal(registration)
        self.registration = registration
        logger.info("run %s registered at %s", description.name, self._server)
        hello = {
            "epoch": registration.epoch,
            "step": description.step,
            "applied": description.applied,
        }
        answer = await self._insist(
            lambda: client.post(f"runs/{registration.run}/hello", hello), what="hello"
        )
        for entry in answer.get("settled", ()):
            self.settled.append((str(entry["adaptation"]), str(entry["state"])))

    async def _register(self, client: Client, description: RunDescription) -> Registration:
        body, key = description.to_wire(), str(uuid.uuid4())

        async def attempt() -> Registration:
            answer = await client.post("runs", body, key=key)
            try:
                return Registration.from_wire(answer)
            except CodecError as error:
                raise TransportError(f"runs: {error}", permanent=True) from error

        return await self._insist(attempt, what="registering the run")

    async def _open_journal(self, registration: Registration) -> Journal:
        directory = state_directory() / registration.run
        while True:  # the process that we replace may be about to end
            try:
                journal = Journal(directory)
                break
            except BlockingIOError:
                await asyncio.sleep(0.2)
        journal.start_epoch(
            run=registration.run,
            epoch=registration.epoch,
            server=self._server,
            token=registration.token,
        )
        return journal

    async def _serve(self, client: Client) -> None:
        listener = asyncio.create_task(self._listen(client))
        leftovers = asyncio.create_task(deliver_leftovers(self._server, self._pace))
        keeper = asyncio.create_task(self._keep_promises(client))
        sender = asyncio.create_task(self._send_telemetry(client))
        tasks = {listener, leftovers, keeper, sender}
        try:
            while not (keeper.done() and sender.done()):
                running = {task for task in tasks if not task.done()}
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_telemetry(self, client: Client) -> None:
        assert self.registration is not None
        path = f"runs/{self.registration.run}/telemetry"
        while True:
            closing = self._finish is not None
            batch = self.telemetry.take(self.registration.epoch)
            if batch is not None:
                await self._send_batch(client, path, batch)
            elif closing:
                return
            if not closing:
                await asyncio.sleep(self._pause_seconds())
            if not closing and not self.telemetry.crowded:
                await _wait(self._new_telemetry, self._pace.flush)

    async def _send_batch(self, client: Client, path: str, batch: Batch) -> None:
        try:
            answer = await self._insist(lambda: client.post(path, batch.body), what="telemetry")
        except TransportError as error:
            self.telemetry.settle_dropped(batch)
            if _ends_the_run(error):
                raise
            logger.error("the server will not take %d telemetry items: %s", batch.items, error)
            return
        except asyncio.CancelledError:
            self.telemetry.settle_dropped(batch)
            raise
        self.telemetry.settle_stored(batch)
        self._slow_down_until = time.monotonic() + float(answer.get("slow_down_ms") or 0) / 1000

    def _pause_seconds(self) -> float:
        return max(self._pace.least_gap, self._slow_down_until - time.monotonic())

    async def _keep_promises(self, client: Client) -> None:
        assert self._journal is not None
        while True:
            closing = self._finish is not None
            self._write_promises()
            for promise in self._journal.promises:
                await self._keep_promise(client, promise)
            if closing and not self._owed:
                return
            await _wait(self._new_promise, self._pace.flush)

    def _write_promises(self) -> None:
        assert self._journal is not None
        assert self.registration is not None
        while self._owed:
            path, body = self._owed.popleft()
            body = {**body, "epoch": self.registration.epoch}
            self._journal.promise(f"runs/{self.registration.run}/{path}", body)

    async def _keep_promise(self, client: Client, promise: Promise) -> None:
        assert self._journal is not None
        assert self.registration is not None
        try:
            await self._insist(lambda: client.post(promise.path, promise.body), what=promise.path)
        except TransportError as error:
            mine = promise.body.get("epoch") == self.registration.epoch
            if _ends_the_run(error) and mine and error.code != "run-ended":
                raise
            logger.warning("the server did not want %s: %s", promise.path, error)
        self._journal.keep(promise)

    async def _say_finish(self, client: Client) -> None:
        self._promise_finish()
        await self._keep_promises(client)
        logger.info("run finished; %s", self._ledger())

    def _promise_finish(self) -> None:
        if self._finish is not None and not self._finish_promised:
            self._finish_promised = True
            self._owed.append(("finish", self._finish))

    def _leave_journal(self) -> None:
        if self._journal is None:
            return
        if not self.problem:
            self._promise_finish()
            self._write_promises()
        self._journal.close()

    # -- listening -----------------------------------------------------------------------------

    async def _listen(self, client: Client) -> None:
        back_off = BackOff(self._pace.first_retry, min(5.0, self._pace.longest_retry))
        while True:
            try:
                await self._catch_up(client)
                await self._follow_stream(client, back_off)
            except TransportError as error:
                if _ends_the_run(error):
                    raise
                logger.debug("commands: %s", error)
            except (OSError, WebSocketException, TimeoutError) as error:
                logger.debug("command stream: %s", error)
            await asyncio.sleep(back_off.next_delay())

    async def _catch_up(self, client: Client) -> None:
        assert self.registration is not None
        answer = await client.get(f"runs/{self.registration.run}/commands?after={self._last_seq}")
        for entry in answer.get("results", ()):
            await self._on_command(
                client, entry.get("command"), entry.get("signature"), catching_up=True
            )

    async def _follow_stream(self, client: Client, back_off: BackOff) -> None:
        address = f"{self._stream_address()}?after={self._last_seq}"
        proxy: Literal[True] | None = None if is_loopback(self._server) else True
        async with connect(
            address,
            additional_headers={"Authorization": f"Bearer {client.token}"},
            max_size=_MAX_MESSAGE_BYTES,
            open_timeout=5,
            proxy=proxy,
        ) as socket:
            back_off.reset()
            while True:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    message = await socket.recv()
                await self._on_message(client, message)

    def _stream_address(self) -> str:
        assert self.registration is not None
        base = urlsplit(self._server)
        stream = urlsplit(self.registration.stream or f"/ws/v1/trainer/{self.registration.run}")
        scheme = "wss" if base.scheme == "https" else "ws"
        # Always the server that we were told to trust, whatever the answer says.
        return urlunsplit((scheme, base.netloc, base.path.rstrip("/") + stream.path, "", ""))

    async def _on_message(self, client: Client, message: str | bytes) -> None:
        try:
            data = codec.decode(message)
        except CodecError as error:
            logger.warning("unreadable message on the command stream: %s", error)
            return
        kind = data.get("type") if isinstance(data, dict) else None
        if kind == "command":
            await self._on_command(client, data.get("command"), data.get("signature"))
        elif kind == "stopped":
            logger.info("the server closes the command stream: %s", data.get("reason", ""))

    @property
    def _last_seq(self) -> int:
        assert self._journal is not None
        assert self.registration is not None
        return max(self._journal.state.command_seq, self.registration.last_command_seq)

    async def _on_command(
        self, client: Client, raw: Any, signature: Any, *, catching_up: bool = False
    ) -> None:
        try:
            command = parse_command(raw)
        except CommandRefusedError as refusal:
            logger.warning("a malformed command was refused: %s", refusal.reason)
            self._refuse(raw.get("seq") if isinstance(raw, dict) else None, refusal)
            return
        if command.seq > self._last_seq + 1 and not catching_up:
            await self._catch_up(client)  # an earlier one was lost on the way
            if command.seq <= self._last_seq:
                return
        if command.seq in self._pending:
            return  # delivered twice; its answer is on the way
        try:
            await self._take_command(client, command, str(signature))
        except CommandRefusedError as refusal:
            logger.warning("command %d (%s) refused: %s", command.seq, command.kind, refusal)
            self._refuse(command.seq, refusal)

    async def _take_command(self, client: Client, command: Command, signature: str) -> None:
        assert self._journal is not None
        assert self.registration is not None
        trust = self.registration.trust
        try:
            verify_command(command, signature, trust, last_seq=self._last_seq, now=self.now())
        except CommandRefusedError as refusal:
            if refusal.code == RefusalCode.EXPIRED:  # genuine, so its number is used up
                self._journal.take_command(command.seq)
            raise
        self._journal.take_command(command.seq)
        self._veto.check(command)
        self._pending.add(command.seq)
        self.owe(
            f"commands/{command.seq}/ack",
            CommandAck(seq=command.seq, state=CommandState.ACCEPTED).to_wire(),
        )
        try:
            graft = await self._prepare_graft(client, command)
        except CommandRefusedError:
            self._pending.discard(command.seq)
            raise
        except Exception as error:  # a blueprint's own bug must not end the transport
            logger.exception("command %d could not be prepared", command.seq)
            text = f"{type(error).__name__}: {error}"
            self.answer(CommandAck(seq=command.seq, state=CommandState.FAILED, reason=text))
            return
        self.inbox.append(ReadyCommand(command, graft))

    async def _prepare_graft(self, client: Client, command: Command) -> Any:
        assert self.registration is not None
        if command.kind is not CommandKind.GRAFT:
            return None

        async def download(path: str) -> bytes:
            return await insist(
                lambda: client.get_bytes(path, most=MAX_FILE_BYTES),
                back_off=self._pace.back_off(),
                what="kernel",
                give_up=lambda: self.now() >= command.expires_at,
            )

        try:
            files = await fetch_kernel(command.kernel_digest, download)
            _, recipe, _ = open_kernel(
                files, command.kernel_digest, self.registration.trust.kernel_key
            )
        except KernelDigestError as error:
            raise CommandRefusedError(RefusalCode.BAD_DIGEST, str(error)) from error
        except SignatureError as error:
            raise CommandRefusedError(RefusalCode.BAD_SIGNATURE, str(error)) from error
        except TransportError as error:
            code = RefusalCode.BAD_DIGEST if error.permanent else RefusalCode.EXPIRED
            raise CommandRefusedError(code, f"no kernel: {error}") from error
        return self._prepare(command, recipe)

    def _refuse(self, seq: Any, refusal: CommandRefusedError) -> None:
        if type(seq) is not int:
            return
        self.answer(
            CommandAck(
                seq=seq, state=CommandState.REFUSED, code=refusal.code, reason=refusal.reason
            )
        )

    # -- waiting and giving up -----------------------------------------------------------------

    async def _insist(self, attempt: Callable[[], Awaitable[_T]], *, what: str) -> _T:
        return await insist(attempt, back_off=self._pace.back_off(), what=what)

    def _give_up(self, error: TransportError) -> None:
        self.problem = str(error)
        logger.error(
            "Esper no longer reports this run: %s. %s Training goes on; %s",
            error,
            _advice(error),
            self._ledger(),
        )

    def _ledger(self) -> str:
        queue = self.telemetry
        return (
            f"telemetry: {queue.offered} offered, {queue.stored} stored, {queue.dropped} dropped, "
            f"{len(queue)} waiting"
        )


async def deliver_leftovers(server: str, pace: Pace | None = None) -> int:
    """Keep the promises of runs that ended while this server was away.

    Returns:
        How many were answered.
    """
    answered = 0
    for path in sorted(state_directory().glob(f"*/{JOURNAL_FILE}")):
        try:
            journal = Journal(path.parent)
        except OSError:
            continue  # its own process is alive
        try:
            if journal.state.server == server:
                answered += await _deliver(journal, pace or Pace())
        finally:
            journal.close()
    return answered


async def _deliver(journal: Journal, pace: Pace) -> int:
    client = Client(journal.state.server, journal.state.token)
    answered = 0
    try:
        for promise in journal.promises:
            try:
                attempt = partial(client.post, promise.path, promise.body)
                await insist(attempt, back_off=pace.back_off(), what=promise.path)
            except TransportError as error:
                logger.warning("the server did not want %s: %s", promise.path, error)
            journal.keep(promise)
            answered += 1
    finally:
        await client.close()
    return answered


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
    event.clear()


def _ends_the_run(error: TransportError) -> bool:
    """True when nothing more of this life of the run will be taken."""
    ended = error.code in ("old-epoch", "run-ended")
    return error.permanent and (ended or error.status in (401, 403, 404))


def _advice(error: TransportError) -> str:
    if error.code == "old-epoch":
        return "Another process has attached a run of the same name and took over."
    if error.code == "run-ended":
        return "The server has closed the run."
    if error.status in (401, 403):
        return "Check ESPER_TOKEN: it needs the scope runs:create and must not be revoked."
    if error.status == 404:
        return "Check ESPER_SERVER, and that the run was not deleted."
    return "Server and trainer do not understand each other: compare their versions of Esper."
