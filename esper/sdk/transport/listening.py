"""Receives the commands of one registered run, over a websocket or by polling.

command -> verify -> journal -> accepted -> kernel fetched, opened, built -> inbox
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from esper.compilation.verify import open_kernel
from esper.contracts import (
    Command,
    CommandAck,
    CommandKind,
    CommandState,
    KernelSpec,
    RefusalCode,
    codec,
)
from esper.contracts.kernels import BUNDLE_FILES, COMPILED_FILES, size_limit
from esper.exceptions import (
    CodecError,
    CommandRefusedError,
    KernelDigestError,
    SignatureError,
    TransportError,
)
from esper.sdk.transport.client import BackOff, Client, insist, is_loopback
from esper.sdk.transport.commands import LocalVeto, parse_command, verify_command
from esper.sdk.transport.journal import Journal
from esper.sdk.transport.kernels import fetch_kernel
from esper.sdk.transport.outgoing import ends_the_run
from esper.sdk.transport.queues import Pace, ReadyCommand, TransportQueues, WaitingElsewhere
from esper.sdk.transport.registration import Registration

logger = logging.getLogger("esper")


_SILENCE_SECONDS = 30.0  # the server pings every 10 s
_PONG = '{"type":"pong"}'
_LONGEST_RETRY_SECONDS = 5.0  # also the period of polling where websockets do not get through
_MAX_MESSAGE_BYTES = 256 * 1024
_LONGEST_NAME = 300  # characters of a line on the console


def _waiting(data: Mapping[str, Any]) -> WaitingElsewhere:
    names = (
        str(data.get(name, ""))[:_LONGEST_NAME] for name in ("adaptation", "layer", "blueprint")
    )
    return WaitingElsewhere(*names)


class Preparation(Protocol):
    """The slow part of a command, done beside the training."""

    def prepare(self, command: Command, spec: KernelSpec) -> Any:
        """The graft, built; in the transport thread. Raises ``CommandRefusedError``."""

    def try_out(self, command: Command, files: Mapping[str, bytes]) -> Any:
        """The compiled kernel, loaded and measured; in a thread of its own. Raises likewise."""


class Listener:
    """Receives, verifies and prepares the run's commands.

    Args:
        veto: the trainer's own limits.
        preparation: makes commands ready for the step boundary.
    """

    def __init__(
        self,
        client: Client,
        registration: Registration,
        journal: Journal,
        queues: TransportQueues,
        pace: Pace,
        *,
        veto: LocalVeto,
        preparation: Preparation,
    ) -> None:
        self._client = client
        self._registration = registration
        self._journal = journal
        self._queues = queues
        self._pace = pace
        self._veto = veto
        self._preparation = preparation
        self._trials: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Endless; raises ``TransportError`` when the server accepts nothing more of this run."""
        back_off = self._pace.back_off(_LONGEST_RETRY_SECONDS)
        while True:
            try:
                await self._catch_up()
                await self._follow_stream(back_off)
            except TransportError as error:
                if ends_the_run(error):
                    raise
                logger.debug("commands: %s", error)
            except (OSError, WebSocketException) as error:  # a timeout is an OSError
                logger.debug("command stream: %s", error)
            await asyncio.sleep(back_off.next_delay())

    async def _catch_up(self) -> None:
        epoch = self._registration.epoch
        path = f"runs/{self._registration.run}/commands?after={self._last_seq}&epoch={epoch}"
        answer = await self._client.get(path)
        for entry in answer.get("results", ()):
            await self._on_command(entry.get("command"), entry.get("signature"), in_order=True)

    async def _follow_stream(self, back_off: BackOff) -> None:
        proxy: Literal[True] | None = None if is_loopback(self._client.server) else True
        async with connect(
            f"{self._stream_address()}?after={self._last_seq}",
            additional_headers={"Authorization": f"Bearer {self._client.token}"},
            max_size=_MAX_MESSAGE_BYTES,
            open_timeout=5,
            # The server pings. The library's own pings draw from Python's global random stream,
            # which is the script's.
            ping_interval=None,
            proxy=proxy,
        ) as socket:
            back_off.reset()
            while True:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    message = await socket.recv()
                if await self._on_message(message) == "ping":
                    await socket.send(_PONG)  # otherwise the server would not know we still run

    def _stream_address(self) -> str:
        base = urlsplit(self._client.server)
        named = self._registration.stream or f"/ws/v1/trainer/{self._registration.run}"
        scheme = "wss" if base.scheme == "https" else "ws"
        # Always the server that attach was given: an answer cannot name another one.
        path = base.path.rstrip("/") + urlsplit(named).path
        return urlunsplit((scheme, base.netloc, path, "", ""))

    async def _on_message(self, message: str | bytes) -> Any:
        """Follow a message of the server, and return its type."""
        try:
            data = codec.decode(message)
        except CodecError as error:
            logger.warning("unreadable message on the command stream: %s", error)
            return None
        kind = data.get("type") if isinstance(data, dict) else None
        if kind == "command":
            await self._on_command(data.get("command"), data.get("signature"))
        elif kind == "waiting":
            self._queues.waiting.append(_waiting(data))
        elif kind == "stopped":
            logger.info("the server closes the command stream: %s", data.get("reason", ""))
        return kind

    @property
    def _last_seq(self) -> int:
        return max(self._journal.state.command_seq, self._registration.last_command_seq)

    async def _on_command(self, raw: Any, signature: Any, *, in_order: bool = False) -> None:
        try:
            command = parse_command(raw)
        except CommandRefusedError as refusal:
            self._refuse(raw.get("seq") if isinstance(raw, dict) else None, refusal)
            return
        if command.seq > self._last_seq + 1 and not in_order:
            await self._catch_up()  # an earlier one was lost on the way
            if command.seq <= self._last_seq:
                return
        if command.seq in self._queues.pending:
            return  # delivered twice; its answer is pending
        try:
            await self._take(command, str(signature))
        except CommandRefusedError as refusal:
            self._refuse(command.seq, refusal)

    async def _take(self, command: Command, signature: str) -> None:
        self._verify(command, signature)
        self._journal.take_command(command.seq)
        self._veto.check(command)
        self._queues.pending.add(command.seq)
        accepted = CommandAck(seq=command.seq, state=CommandState.ACCEPTED)
        self._queues.answer(accepted, final=False)
        if command.kind is CommandKind.SPEED_UP:
            # It takes seconds the first time; an undo must not wait for it.
            trial = asyncio.create_task(self._speed_up(command))
            self._trials.add(trial)
            trial.add_done_callback(self._trials.discard)
            return
        graft = None
        if command.kind is CommandKind.GRAFT:
            spec = await self._fetch(command)
            try:
                graft = self._preparation.prepare(command, spec)
            except CommandRefusedError:
                raise
            except Exception as error:  # a blueprint's own bug must not end the transport
                logger.exception("command %d could not be prepared", command.seq)
                self._fail(command, error)
                return
        self._queues.inbox.append(ReadyCommand(command, graft))

    async def _speed_up(self, command: Command) -> None:
        try:
            files = await self._fetch_files(command, COMPILED_FILES)
            swap = await asyncio.to_thread(self._preparation.try_out, command, files)
        except CommandRefusedError as refusal:
            self._refuse(command.seq, refusal)
        except Exception as error:  # nothing about speed may end the transport
            logger.exception("command %d could not be tried", command.seq)
            self._fail(command, error)
        else:
            self._queues.inbox.append(ReadyCommand(command, swap))

    def _verify(self, command: Command, signature: str) -> None:
        trust, now = self._registration.trust, self._queues.now()
        try:
            verify_command(command, signature, trust, last_seq=self._last_seq, now=now)
        except CommandRefusedError as refusal:
            if refusal.code == RefusalCode.EXPIRED:  # genuine, so its number counts as taken
                self._journal.take_command(command.seq)
            raise

    async def _fetch(self, command: Command) -> KernelSpec:
        """The kernel's spec; nothing of it is read before digest and signature are checked."""
        digest = command.kernel_digest
        files = await self._fetch_files(command, BUNDLE_FILES)
        try:
            _, spec, _ = open_kernel(files, digest, self._registration.kernel_key)
        except KernelDigestError as error:
            raise CommandRefusedError(RefusalCode.BAD_DIGEST, str(error)) from error
        except SignatureError as error:
            raise CommandRefusedError(RefusalCode.BAD_SIGNATURE, str(error)) from error
        return spec

    async def _fetch_files(self, command: Command, names: Sequence[str]) -> dict[str, bytes]:
        download = partial(self._download, command.expires_at)
        try:
            return await fetch_kernel(command.kernel_digest, download, names)
        except KernelDigestError as error:
            raise CommandRefusedError(RefusalCode.BAD_DIGEST, str(error)) from error
        except TransportError as error:
            code = RefusalCode.BAD_DIGEST if error.permanent else RefusalCode.EXPIRED
            raise CommandRefusedError(code, f"no kernel: {error}") from error

    async def _download(self, expires_at: float, path: str) -> bytes:
        most = size_limit(path.rpartition("/")[2])
        return await insist(
            partial(self._client.get_bytes, path, most=most),
            back_off=self._pace.back_off(),
            what="kernel",
            give_up=lambda: self._queues.now() >= expires_at,
        )

    def _fail(self, command: Command, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        ack = CommandAck(seq=command.seq, state=CommandState.FAILED, reason=reason)
        self._queues.answer(ack)

    def _refuse(self, seq: Any, refusal: CommandRefusedError) -> None:
        logger.warning("command %s refused: %s", seq, refusal)
        if type(seq) is not int:
            return  # without a number, the server could not match an answer
        ack = CommandAck(
            seq=seq, state=CommandState.REFUSED, code=refusal.code, reason=refusal.reason
        )
        self._queues.answer(ack)
