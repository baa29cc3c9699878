"""Lines of many processes on one terminal, and a log file for each process."""

from __future__ import annotations

import os
import sys
from collections import deque
from datetime import datetime
from pathlib import Path
from typing import TextIO

from hosts.redaction import redact

OWN_NAME = "esper"
TAIL_LINES = 20
LOG_FILE_BYTES = 10 * 1024 * 1024
_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)  # ANSI foregrounds, readable on dark and light


class Output:
    """Writes ``HH:MM:SS name | line``; colours on a terminal only. Nothing here raises.

    A line that cannot be written, because the disk is full or the terminal was closed, is counted
    and given up: the process that prints it, and the task that reads it, must go on.

    Args:
        directory: where log files go.
        stream: the terminal; stdout when left out.
        width: of the name column.
    """

    def __init__(self, directory: Path, *, stream: TextIO | None = None, width: int = 15) -> None:
        self._stream = stream or sys.stdout
        self._coloured = self._stream.isatty()
        self._width = width
        self._watched = True
        self._logs = LogFiles(directory)
        self._tails: dict[str, deque[str]] = {}

    def say(self, line: str) -> None:
        """A line of the supervisor itself."""
        self.line(OWN_NAME, line)

    def line(self, name: str, text: str, *, show: bool = True) -> None:
        """One line of the process ``name``; without ``show`` it is written to its log file only."""
        text = redact(text.rstrip("\r\n"))
        self._tails.setdefault(name, deque(maxlen=TAIL_LINES)).append(text)
        notice = self._logs.write(name, text)
        if text and show:
            self._show(name, text)
        if notice:
            self._show(OWN_NAME, notice)

    def plain(self, text: str) -> None:
        """A line without a prefix."""
        self._print(text)

    def tail(self, name: str) -> list[str]:
        """The last lines of a process."""
        return list(self._tails.get(name, ()))

    def close(self) -> None:
        """Closes the log files."""
        self._logs.close()

    def _show(self, name: str, text: str) -> None:
        prefix = f"{datetime.now().astimezone():%H:%M:%S} {name:<{self._width}} |"
        if self._coloured:
            prefix = f"\033[{self._colour(name)}m{prefix}\033[0m"
        self._print(f"{prefix} {text}")

    def _print(self, line: str) -> None:
        if not self._watched:
            return
        try:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except (BrokenPipeError, ValueError):  # the terminal was closed; Esper runs on
            self._watched = False
        except OSError:  # it is a file on a full disk; the next line may fit again
            pass

    def _colour(self, name: str) -> int:
        names = list(self._tails)
        return _COLOURS[(names.index(name) if name in names else 0) % len(_COLOURS)]


class LogFiles:
    """``<name>.log`` for each process. What cannot be written is counted and given up."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, int] = {}
        self._lost = 0
        self._failing = ""  # why the last line was lost; empty: it was written

    def write(self, name: str, text: str) -> str:
        """Appends one line; returns a sentence when writing begins to fail or works again."""
        stamp = datetime.now().astimezone().isoformat(timespec="milliseconds")
        line = f"{stamp} {text}\n"
        if self._failing:  # the failed write may have left half a line
            line = f"\n{line}"
        try:
            _write_whole(self._file(name), line.encode("utf-8", "replace"))
        except OSError as error:
            return self._note_loss(error)
        return self._note_success()

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _note_loss(self, error: OSError) -> str:
        self._lost += 1
        before, self._failing = self._failing, error.strerror or type(error).__name__
        if before:
            return ""
        return f"log lines cannot be written to {self._directory}: {self._failing}"

    def _note_success(self) -> str:
        if not self._failing:
            return ""
        lost, why = self._lost, self._failing
        self._lost, self._failing = 0, ""
        return f"log lines are written again; {lost} were lost ({why})"

    def _file(self, name: str) -> int:
        if name not in self._files:
            path = self._directory / f"{name}.log"
            self._directory.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > LOG_FILE_BYTES:
                path.replace(path.with_suffix(".log.1"))
            # Unbuffered: a buffer keeps what could not be written, and fails again later.
            self._files[name] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        return self._files[name]


def _write_whole(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
