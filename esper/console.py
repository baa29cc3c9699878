"""Lines on the console for what a user must know: one line each, on stderr, and never an error.

The logger ``esper`` gets the same lines, and the library sets no handler on it. A line that a
handler of the user shows on the console already is not written a second time. Where no handler is
set, Python would print the library's warnings itself; a filter writes them like all other lines,
so that they are one line each, respect progress bars, and can be silenced.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import weakref
from dataclasses import dataclass
from typing import Any, TextIO

from esper.fail_closed import errors_ignored

logger = logging.getLogger("esper")

VARIABLE = "ESPER_VERBOSE"
PREFIX = "esper: "
SHOWN_LINES = 3  # of one kind, in one window
WINDOW_STEPS = 100
REPEAT_STEPS = 1000  # the same line is not written again for so long
MAX_LENGTH = 600
_SAID = "esper_said"  # attribute of a record that the console has written, or must not write
# For terminals that cannot show them.
_PLAIN = str.maketrans(
    {"…": "...", "×": "x", "→": "->", "–": "-", "≥": ">=", "≤": "<=", "±": "+/-"}
)
# Handlers that write to the console, though not through a stream of their own.
_CONSOLE_HANDLERS = frozenset({"RichHandler", "ABSLHandler"})


def switched_on() -> bool:
    """False where the environment silences the console."""
    return os.environ.get(VARIABLE, "").strip().lower() not in ("0", "false", "no", "off")


@dataclass(slots=True)
class _Window:
    """The lines of one kind in one stretch of steps."""

    since: int
    shown: int = 0
    held: int = 0
    told: bool = False  # that lines were held back


class Console:
    """Writes the lines of one run.

    Args:
        enabled: False: lines go to the logger only.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled and switched_on()
        self._windows: dict[str, _Window] = {}
        self._written: dict[str, int] = {}  # line -> step
        _consoles.add(self)

    def say(self, line: str, *, step: int = 0, kind: str = "", level: int = logging.INFO) -> None:
        """Log the line, and write it unless logging shows it on the console already.

        Args:
            step: the training step, which counts how often lines of one kind are written.
            kind: lines of one kind are folded when they are many; empty: never folded.
        """
        with errors_ignored():  # a filter of the user may raise
            logger.log(level, "%s", line, extra={_SAID: True})
        if not self.enabled or logger.level > level or _logging_shows(level):
            return
        if not kind or self._is_due(line, step, kind):
            write_line(PREFIX + line)

    def fold(self, step: int, *, last: bool = False) -> None:
        """Write how many lines were held back; call it at the end of a step.

        Args:
            last: no step comes after this one.
        """
        for kind, window in list(self._windows.items()):
            over = last or not 0 <= step - window.since < WINDOW_STEPS
            if window.held and (over or not window.told):
                write_line(
                    f"{PREFIX}… and {window.held} more: {kind}; print(session) shows the run"
                )
                window.held, window.told = 0, True
            if over:
                del self._windows[kind]

    @property
    def idle_until(self) -> float:
        """The next step whose end :meth:`fold` must see; infinity where no line is held back."""
        held = [window for window in self._windows.values() if window.held]
        return min((w.since + WINDOW_STEPS if w.told else 0 for w in held), default=math.inf)

    def _is_due(self, line: str, step: int, kind: str) -> bool:
        written = self._written.get(line)
        if written is not None and 0 <= step - written < REPEAT_STEPS:
            return False
        window = self._windows.setdefault(kind, _Window(step))
        if window.shown >= SHOWN_LINES:
            window.held += 1
            return False
        window.shown += 1
        self._written[line] = step
        if len(self._written) > REPEAT_STEPS:
            self._written.pop(next(iter(self._written)))
        return True


def write_line(text: str) -> None:
    """One line on stderr, above a progress bar that is active there; never raises."""
    stream = sys.stderr
    if stream is None:  # a process without a console
        return
    with errors_ignored():  # closed, broken, full: nothing that training should see
        line = _encodable(_one_line(text), stream)
        bars = _active_bars()
        if bars is not None:
            with errors_ignored():
                bars.write(line, file=stream)
                return
        stream.write(line + "\n")
        stream.flush()


def printable(text: str) -> str:
    """The text, with other signs for those that standard output cannot show."""
    return _encodable(text, sys.stdout)


def _one_line(text: str) -> str:
    """Without what could move the cursor or end the line."""
    printable = "".join(sign if sign.isprintable() else " " for sign in text)
    line = " ".join(printable.split())
    return line if len(line) <= MAX_LENGTH else line[: MAX_LENGTH - 1] + "…"


def _encodable(line: str, stream: TextIO | None) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        line.encode(encoding)
    except LookupError:
        encoding = "ascii"
    except UnicodeEncodeError:
        pass
    else:
        return line
    return line.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)


def _active_bars() -> Any:
    """The class of tqdm's progress bars while one is on the screen, else None."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    return bars if len(getattr(bars, "_instances", ())) else None


def _logging_shows(level: int) -> bool:
    """A handler of the user writes records of this level to the console."""
    if logger.disabled or not logger.isEnabledFor(level):
        return False
    source: logging.Logger | None = logger
    while source is not None:
        if any(level >= handler.level and _on_console(handler) for handler in source.handlers):
            return True
        source = source.parent if source.propagate else None
    return False


def _on_console(handler: logging.Handler) -> bool:
    if any(kind.__name__ in _CONSOLE_HANDLERS for kind in type(handler).__mro__):
        return True
    if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
        return False
    streams = (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
    return any(handler.stream is stream for stream in streams if stream is not None)


class _WithoutHandlers(logging.Filter):
    """Writes warnings of the library itself while the user has not configured logging."""

    def filter(self, record: logging.LogRecord) -> bool:
        if logger.hasHandlers():
            return True
        said = getattr(record, _SAID, False)
        with errors_ignored():
            if record.levelno >= logging.WARNING and not said and _may_write():
                write_line(PREFIX + _text_of(record))
        return False


def _text_of(record: logging.LogRecord) -> str:
    error = record.exc_info[1] if record.exc_info else None
    cause = f": {type(error).__name__}: {error}" if error is not None else ""
    return record.getMessage() + cause


def _may_write() -> bool:
    """Some run of this process is not silenced, or there is none."""
    consoles = list(_consoles)
    return switched_on() and (not consoles or any(console.enabled for console in consoles))


_consoles: weakref.WeakSet[Console] = weakref.WeakSet()
if not any(isinstance(entry, _WithoutHandlers) for entry in logger.filters):
    logger.addFilter(_WithoutHandlers())
