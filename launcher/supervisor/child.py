"""One child process: started, watched, restarted with back-off, stopped.

start ──► running ──► ended ──── stopped by us, or finished ─► done
            ▲                 │
            └─ wait 1,2,4…30 s┘  five quick ends in a row: it is down until it runs for a while
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum

from hosts.processes import (
    describe_exit,
    dies_with_parent,
    signal_group,
    signal_process,
)
from launcher.supervisor.output import Output

READ_BYTES = 65536
LONGEST_LINE_BYTES = 64 * 1024


class Restart(StrEnum):
    """When an ended child is started again."""

    ALWAYS = "always"  # a service
    ON_FAILURE = "on_failure"  # a job: exit code 0 means that it is done


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """What to run, and how to treat it. A low ``stop_order`` is stopped first."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    restart: Restart = Restart.ALWAYS
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 10.0
    stop_order: int = 0
    niceness: int = 0
    ready: Callable[[], Awaitable[bool]] | None = None
    hidden: re.Pattern[str] | None = None  # lines that are written to the log file only


@dataclass(frozen=True, slots=True)
class Down:
    """A child that cannot be kept running at present. It is tried again without an end.

    Attributes:
        since: seconds since the epoch.
        ends: quick ends in a row.
        why: how it ended last.
        tail: its last lines.
    """

    since: float
    ends: int
    why: str
    tail: tuple[str, ...]


@dataclass
class Backoff:
    """How long to wait before the next start.

    Args:
        first_delay: seconds after the first end; doubles up to ``longest_delay``.
        steady_after: seconds of running after which an end counts as the first again.
        limit: quick ends in a row from which the child counts as down.
    """

    first_delay: float = 1.0
    longest_delay: float = 30.0
    steady_after: float = 10.0
    limit: int = 5
    ends: int = 0

    def next_delay(self, uptime: float) -> float:
        """Seconds to wait. There is no end of trying: the cause may go."""
        self.ends = 1 if uptime >= self.steady_after else self.ends + 1
        # The exponent is limited, because a power of some thousands is no float any more.
        delay: float = min(self.first_delay * 2 ** min(self.ends - 1, 32), self.longest_delay)
        return delay

    @property
    def exhausted(self) -> bool:
        """The child has ended too often, too quickly."""
        return self.ends >= self.limit


@asynccontextmanager
async def open_pipe() -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
    """A reader, and the descriptor that a child writes to.

    A grandchild may keep the pipe open after the child has ended. A pipe that asyncio opens for a
    subprocess is then closed by the garbage collector, after the loop: "Event loop is closed".
    """
    read_end, write_end = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb", buffering=0)
    )
    try:
        yield reader, write_end
    finally:
        transport.close()


@dataclass
class Child:
    """A ``ChildSpec`` with its process.

    ``on_change`` is called when the process id changes, and when the child goes down or comes back.
    """

    spec: ChildSpec
    output: Output
    backoff: Backoff = field(default_factory=Backoff)
    on_change: Callable[[], None] = lambda: None
    process: asyncio.subprocess.Process | None = None
    finished: bool = False
    restarts: int = 0
    down: Down | None = None
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _started: bool = False

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        alive = self.process is not None and self.process.returncode is None
        return self.process.pid if alive and self.process else None

    async def keep_running(self) -> None:
        """Runs until it is stopped or has finished. Nothing else ends it."""
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                code = await self._run_once()
                why = f"ended ({describe_exit(code)})"
            except Exception as error:  # the process was not started, or its supervision failed
                code, why = -1, f"failed ({type(error).__name__}: {error})"
                self._kill()
            if self._stop.is_set():
                return
            if code == 0 and self.spec.restart is Restart.ON_FAILURE:
                self.finished = True
                self._set_down(None)
                self.output.say(f"{self.spec.name} has finished")
                return
            await self._wait_before_restart(why, time.monotonic() - started)

    async def wait_ready(self, timeout: float) -> bool:
        """Whether it answers within ``timeout`` seconds, before it goes down or is stopped."""
        deadline = time.monotonic() + timeout
        while not (self._started and (self.spec.ready is None or await self.spec.ready())):
            if self.down or self._stop.is_set() or time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.1)
        return True

    async def stop(self) -> None:
        """Asks it to end, and kills it when it does not. Idempotent."""
        self._stop.set()
        process = self.process
        if process is None:
            return
        if process.returncode is None:
            signal_process(process.pid, self.spec.stop_signal)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.spec.stop_seconds):
                    await process.wait()
        if process.returncode is None:
            self.output.say(f"{self.spec.name} does not stop; killing it")
        signal_group(process.pid, signal.SIGKILL)
        await process.wait()

    async def _run_once(self) -> int:
        async with open_pipe() as (stream, write_end):
            try:
                process = await self._start_process(write_end)
            finally:
                os.close(write_end)
            self.process = process
            if self._stop.is_set():  # stop() was called while the process was being started
                signal_group(process.pid, signal.SIGKILL)
            self._started = True
            pump = asyncio.create_task(self._pump(stream))
            steady = asyncio.create_task(self._come_back())
            try:
                self.on_change()
                code = await process.wait()
            finally:
                steady.cancel()
            # Children of a killed parent would run on and keep the pipe open.
            signal_group(process.pid, signal.SIGKILL)
            with suppress(TimeoutError):
                await asyncio.wait_for(pump, 1.0)
            self.on_change()
            return code

    async def _start_process(self, write_end: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.spec.argv,
            env=dict(self.spec.env),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write_end,
            stderr=asyncio.subprocess.STDOUT,
            # A session of its own: Ctrl-C reaches us only, and its whole group can be signalled.
            start_new_session=True,
            preexec_fn=dies_with_parent(self.spec.niceness),
        )

    async def _wait_before_restart(self, why: str, uptime: float) -> None:
        delay = self.backoff.next_delay(uptime)
        self.restarts += 1
        self.output.say(
            f"{self.spec.name} {why} after {uptime:.0f} s; starting it again in {delay:g} s"
        )
        if self.backoff.exhausted:
            self._go_down(why)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), delay)

    def _go_down(self, why: str) -> None:
        tail = tuple(self.output.tail(self.spec.name))
        if self.down is None:
            self.output.say(
                f"{self.spec.name} is down: it ended {self.backoff.ends} times in a row right "
                "after its start. It is tried again until it runs. Its last lines:"
            )
            for line in tail:
                self.output.plain(f"    {line}")
        since = self.down.since if self.down else time.time()
        self._set_down(Down(since=since, ends=self.backoff.ends, why=why, tail=tail))

    async def _come_back(self) -> None:
        """Runs beside the process: one that has run for a while is no longer down."""
        await asyncio.sleep(self.backoff.steady_after)
        if self.down is not None:
            self.output.say(f"{self.spec.name} runs again")
            self._set_down(None)

    def _set_down(self, down: Down | None) -> None:
        if down != self.down:
            self.down = down
            self.on_change()

    def _kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            signal_group(self.process.pid, signal.SIGKILL)

    async def _pump(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await stream.read(READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > LONGEST_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._print(line)
        if rest:
            self._print(rest)

    def _print(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        hidden = self.spec.hidden is not None and self.spec.hidden.search(text) is not None
        self.output.line(self.spec.name, text, show=not hidden)
