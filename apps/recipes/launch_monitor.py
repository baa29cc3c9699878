"""Monitors one started trainer, so that the worker that started it may stop and start again.

``python -m apps.recipes.launch_monitor`` reads an ``Order`` from standard input, detaches itself
from its parent and writes into the launch's folder:

    process.json   who we and the trainer are: process ids and when each was started
    log.<offset>   what the trainer prints, redacted
    exit.json      how it ended

SIGTERM means: stop the trainer, with SIGKILL once its grace period is over. When the launch monitor
itself is killed, the kernel kills the trainer. This module imports neither Django nor torch.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from apps.recipes.hostlog import LogWriter
from hosts.keyring import write_private
from hosts.processes import dies_with_parent, process_identity, signal_group
from hosts.redaction import redact

PROCESS_FILE = "process.json"
EXIT_FILE = "exit.json"
LAST_LINES = 20
READ_BYTES = 65536
TICK_SECONDS = 0.2
_LONGEST_REST = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to start. The environment holds a token, so it comes over a pipe and is kept nowhere."""

    attempt: int
    argv: list[str]
    directory: str
    environment: dict[str, str]
    folder: str
    grace_seconds: float


@dataclass(frozen=True, kw_only=True)
class ProcessNote:
    """Both processes; ``identity`` tells a process from a later one that has the same id."""

    attempt: int
    monitor_pid: int
    monitor_identity: str
    trainer_pid: int
    trainer_identity: str


@dataclass(frozen=True, kw_only=True)
class ExitNote:
    """How it ended: a code, or a signal, or ``error`` when it could not be started."""

    attempt: int
    code: int | None = None
    signal: str = ""
    asked: bool = False  # the monitor was asked to stop it
    killed: bool = False  # it did not end in its grace period
    error: str = ""
    last_lines: list[str] = field(default_factory=list)


def read_note(path: Path, attempt: int) -> dict[str, Any] | None:
    """The content of this attempt's note; None where there is none."""
    try:
        note: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return note if note.get("attempt") == attempt else None


class LaunchMonitor:
    """One trainer, from its start to its end."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._folder = Path(order.folder)
        self._log = LogWriter(self._folder)
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._rest = b""
        self._asked_at: float | None = None
        self._killed = False

    def run(self, started: IO[bytes]) -> None:
        """Start it, close ``started`` when process.json is written, and wait until it has ended."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        self._say(f"--- attempt {self._order.attempt} ---")
        try:
            process = self._start()
        except OSError as error:
            self._say(f"--- could not be started: {error} ---")
            self._end(ExitNote(attempt=self._order.attempt, error=str(error)))
            return
        self._note_process(process.pid)
        started.close()
        self._watch(process)
        self._end(self._exit_note(process.returncode))

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._order.argv,
            cwd=self._order.directory,
            env=self._order.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,  # its whole group can be signalled
            preexec_fn=dies_with_parent(),
        )

    def _note_process(self, trainer: int) -> None:
        note = ProcessNote(
            attempt=self._order.attempt,
            monitor_pid=os.getpid(),
            monitor_identity=process_identity(os.getpid()),
            trainer_pid=trainer,
            trainer_identity=process_identity(trainer),
        )
        write_private(self._folder / PROCESS_FILE, json.dumps(asdict(note)))

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        signalled = False
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while process.poll() is None:
                if not selector.get_map():
                    time.sleep(TICK_SECONDS)
                elif selector.select(TICK_SECONDS) and self._pump(process.stdout) == b"":
                    selector.unregister(process.stdout)  # it has closed its output and goes on
                if self._asked_at is not None and not signalled:
                    signalled = True
                    self._say("--- asked to stop ---")
                    signal_group(process.pid, signal.SIGTERM)
                self._kill_after_grace(process.pid)
        # Whatever it has started would go on, with the pipe in its hands.
        signal_group(process.pid, signal.SIGKILL)
        while self._pump(process.stdout):
            pass

    def _kill_after_grace(self, pid: int) -> None:
        late = self._asked_at is not None and (
            time.monotonic() - self._asked_at > self._order.grace_seconds
        )
        if late and not self._killed:
            self._killed = True
            self._say("--- does not stop; killing it ---")
            signal_group(pid, signal.SIGKILL)

    def _pump(self, stream: IO[bytes]) -> bytes | None:
        """Moves what is there into the log: empty at the end, None when nothing is there now."""
        chunk: bytes | None = stream.read(READ_BYTES)
        if not chunk:
            return chunk
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LONGEST_REST:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._line(line.decode("utf-8", "replace"))
        self._log.flush()
        return chunk

    def _line(self, text: str) -> None:
        # A progress bar rewrites its line; its last picture is what counts.
        text = text.rstrip("\r").rpartition("\r")[2]
        self._last.append(text[:400])
        self._log.line(text)

    def _say(self, text: str) -> None:
        self._log.line(text)
        self._log.flush()

    def _exit_note(self, code: int) -> ExitNote:
        if self._rest:
            self._line(self._rest.decode("utf-8", "replace"))
        return ExitNote(
            attempt=self._order.attempt,
            code=code if code >= 0 else None,
            signal=_signal_name(-code) if code < 0 else "",
            asked=self._asked_at is not None,
            killed=self._killed,
            last_lines=[redact(line) for line in self._last],
        )

    def _end(self, note: ExitNote) -> None:
        ended = note.signal or (f"exit code {note.code}" if note.code is not None else "no start")
        self._say(f"--- ended: {ended} ---")
        self._log.close()
        write_private(self._folder / EXIT_FILE, json.dumps(asdict(note)))

    def _on_stop(self, _number: int, _frame: object) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def main() -> int:
    """Read the order; the parent returns once the trainer has started or failed to start."""
    order = Order(**json.load(sys.stdin))
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        os.read(reading, 1)  # until the other end is closed
        return 0
    os.close(reading)
    os.setsid()
    folder = Path(order.folder)
    with (folder / "monitor.log").open("ab") as complaints, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(complaints.fileno(), 1)
        os.dup2(complaints.fileno(), 2)
    with os.fdopen(writing, "wb", closefd=True) as started:
        LaunchMonitor(order).run(started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
