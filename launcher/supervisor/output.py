"""Lines of many processes on one terminal, and a log file for each process."""

from __future__ import annotations

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
    """Writes ``HH:MM:SS name | line``; colours on a terminal only.

    Args:
        directory: where log files go.
        stream: the terminal; stdout when left out.
        width: of the name column.
    """

    def __init__(self, directory: Path, *, stream: TextIO | None = None, width: int = 15) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._stream = stream or sys.stdout
        self._coloured = self._stream.isatty()
        self._width = width
        self._watched = True
        self._files: dict[str, TextIO] = {}
        self._tails: dict[str, deque[str]] = {}

    def say(self, line: str) -> None:
        """A line of the supervisor itself."""
        self.line(OWN_NAME, line)

    def line(self, name: str, text: str, *, show: bool = True) -> None:
        """One line of the process ``name``; without ``show`` it is written to its log file only."""
        text = redact(text.rstrip("\r\n"))
        self._tails.setdefault(name, deque(maxlen=TAIL_LINES)).append(text)
        file = self._file(name)
        file.write(f"{datetime.now().astimezone().isoformat(timespec='milliseconds')} {text}\n")
        file.flush()
        if text and show:
            self._show(name, text)

    def plain(self, text: str) -> None:
        """A line without a prefix."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def tail(self, name: str) -> list[str]:
        """The last lines of a process."""
        return list(self._tails.get(name, ()))

    def close(self) -> None:
        """Closes the log files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _show(self, name: str, text: str) -> None:
        if not self._watched:
            return
        prefix = f"{datetime.now().astimezone():%H:%M:%S} {name:<{self._width}} |"
        if self._coloured:
            prefix = f"\033[{self._colour(name)}m{prefix}\033[0m"
        try:
            self._stream.write(f"{prefix} {text}\n")
            self._stream.flush()
        except (BrokenPipeError, ValueError):  # the terminal was closed; Esper runs on
            self._watched = False

    def _colour(self, name: str) -> int:
        return _COLOURS[list(self._tails).index(name) % len(_COLOURS)]

    def _file(self, name: str) -> TextIO:
        if name not in self._files:
            path = self._directory / f"{name}.log"
            if path.exists() and path.stat().st_size > LOG_FILE_BYTES:
                path.replace(path.with_suffix(".log.1"))
            self._files[name] = path.open("a", encoding="utf-8")
        return self._files[name]
