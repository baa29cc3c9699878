"""What must survive a crash: the last command that was taken, and the reports not yet answered.

An append-only file of JSON lines for each run. A line that was cut off by a crash is skipped, so
the file is readable after a kill at any byte. It holds the run's token: only the owner may read it.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from esper.contracts import codec
from esper.exceptions import CodecError

JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class StoredReport:
    """A report that is sent again until the server answers it.

    ``path`` is relative to the API, ``body`` is the JSON to post.
    """

    number: int
    path: str
    body: dict[str, Any]


@dataclass(slots=True)
class JournalState:
    """What the lines add up to."""

    run: str = ""
    server: str = ""
    token: str = ""
    epoch: int = 0
    command_seq: int = 0  # the last command that was accepted, of any epoch
    reports: dict[int, StoredReport] = field(default_factory=dict)
    last_number: int = 0


def state_directory() -> Path:
    """Where journals live: ``ESPER_STATE_DIR``, else the user's cache."""
    chosen = os.environ.get("ESPER_STATE_DIR", "")
    return Path(chosen) if chosen else Path.home() / ".cache" / "esper" / "runs"


class Journal:
    """One run's journal, held by one process at a time.

    Args:
        directory: the run's own directory; made where it is missing.

    Raises:
        BlockingIOError: another process holds it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / JOURNAL_FILE
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._file: BinaryIO = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise
        self.state = _read(self._file)
        self._file.write(b"\n")  # closes a line that a crash cut off

    @property
    def reports(self) -> tuple[StoredReport, ...]:
        """Those that the server has not answered, oldest first."""
        return tuple(self.state.reports.values())

    def start_epoch(self, *, run: str, epoch: int, server: str, token: str) -> None:
        """Record a (re)start. The file is rewritten, so that it does not grow without limit."""
        state = self.state
        state.run, state.epoch, state.server, state.token = run, epoch, server, token
        self._rewrite()

    def take_command(self, seq: int) -> None:
        """A command was verified and accepted; it will never be taken again."""
        self.state.command_seq = seq
        self._append({"kind": "command", "seq": seq})

    def add_report(self, path: str, body: dict[str, Any]) -> StoredReport:
        """Written to disk when this returns."""
        self.state.last_number += 1
        report = StoredReport(number=self.state.last_number, path=path, body=body)
        self.state.reports[report.number] = report
        self._append(_report_line(report))
        return report

    def remove_report(self, report: StoredReport) -> None:
        """The server has answered."""
        self.state.reports.pop(report.number, None)
        self._append({"kind": "answered", "number": report.number})

    def close(self) -> None:
        """Unlock the file. A journal without unanswered reports is deleted."""
        if self._file.closed:
            return
        if not self.state.reports:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(codec.encode(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _rewrite(self) -> None:
        state = self.state
        lines: list[dict[str, Any]] = [
            {
                "kind": "run",
                "run": state.run,
                "server": state.server,
                "token": state.token,
                "epoch": state.epoch,
            },
            {"kind": "command", "seq": state.command_seq},
            *(_report_line(report) for report in state.reports.values()),
        ]
        # The new file is complete and locked before it replaces the old one.
        fresh = self.path.with_suffix(".new")
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        file = os.fdopen(descriptor, "r+b")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(b"".join(codec.encode(line) + b"\n" for line in lines))
        file.flush()
        os.fsync(descriptor)
        os.replace(fresh, self.path)
        self._file.close()
        self._file = file


def _report_line(report: StoredReport) -> dict[str, Any]:
    return {
        "kind": "report",
        "number": report.number,
        "path": report.path,
        "body": report.body,
    }


def _read(file: BinaryIO) -> JournalState:
    file.seek(0)
    state = JournalState()
    for raw in file.read().split(b"\n"):
        try:
            line = codec.decode(raw)
            _APPLY[line["kind"]](state, line)
        except (CodecError, KeyError, TypeError):
            continue  # the line that a crash cut off
    return state


def _on_run(state: JournalState, line: dict[str, Any]) -> None:
    state.run, state.server = line["run"], line["server"]
    state.token, state.epoch = line["token"], line["epoch"]


def _on_command(state: JournalState, line: dict[str, Any]) -> None:
    state.command_seq = max(state.command_seq, line["seq"])


def _on_report(state: JournalState, line: dict[str, Any]) -> None:
    report = StoredReport(line["number"], line["path"], line["body"])
    state.reports[report.number] = report
    state.last_number = max(state.last_number, report.number)


def _on_answered(state: JournalState, line: dict[str, Any]) -> None:
    state.reports.pop(line["number"], None)


_APPLY = {
    "run": _on_run,
    "command": _on_command,
    "report": _on_report,
    "answered": _on_answered,
}
