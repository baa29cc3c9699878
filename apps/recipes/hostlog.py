"""A launch's log on its host: segments that are named by the offset of their first byte.

The offset counts all bytes ever written, so that it stays valid when old segments are removed. One
process (the launch monitor) writes it, another (the worker) reads it. Only whole, redacted lines
get in.
"""

from __future__ import annotations

from pathlib import Path

from hosts.redaction import redact

SEGMENT_BYTES = 4 * 1024 * 1024
SEGMENTS_KEPT = 4
LONGEST_LINE = 4_000  # characters
_PREFIX = "log."


def segments(folder: Path) -> list[tuple[int, Path]]:
    """(offset, file), oldest first."""
    found = [(path.name.removeprefix(_PREFIX), path) for path in folder.glob(f"{_PREFIX}*")]
    return sorted((int(offset), path) for offset, path in found if offset.isdigit())


def log_end(folder: Path) -> int:
    """The offset behind the last byte."""
    found = segments(folder)
    return found[-1][0] + found[-1][1].stat().st_size if found else 0


class LogWriter:
    """Appends lines; goes on where an earlier attempt has ended."""

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder, self._segment_bytes = folder, segment_bytes
        self._end = log_end(folder)
        found = segments(folder)
        self._start = found[-1][0] if found else 0
        self._file = self._path(self._start).open("ab")

    def line(self, text: str) -> None:
        if len(text) > LONGEST_LINE:
            text = f"{text[:LONGEST_LINE]}…"
        data = f"{redact(text)}\n".encode(errors="replace")
        if self._end - self._start + len(data) > self._segment_bytes:
            self._rotate()
        self._file.write(data)
        self._end += len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        self._start = self._end
        self._file = self._path(self._start).open("ab")
        for _, path in segments(self._folder)[:-SEGMENTS_KEPT]:
            path.unlink(missing_ok=True)

    def _path(self, offset: int) -> Path:
        return self._folder / f"{_PREFIX}{offset:015d}"


def read_log(folder: Path, after: int, *, limit: int) -> tuple[int, bytes]:
    """Whole lines from ``after`` on, or from the oldest that is left: (offset, bytes)."""
    for start, path in segments(folder):
        size = path.stat().st_size
        if start + size <= after:
            continue
        offset = max(start, after)
        with path.open("rb") as file:
            file.seek(offset - start)
            data = file.read(limit)
        return offset, data[: data.rfind(b"\n") + 1]
    return after, b""


def tail_offset(folder: Path, length: int) -> int:
    """Where the last ``length`` bytes begin, at the start of a line."""
    wanted = max(0, log_end(folder) - length)
    for start, path in reversed(segments(folder)):
        if start > wanted:
            continue
        if start == wanted:
            return start
        with path.open("rb") as file:
            file.seek(wanted - start - 1)
            return wanted - 1 + len(file.readline())
    found = segments(folder)
    return found[0][0] if found else 0
