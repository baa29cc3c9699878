"""Signed heads of the audit log, kept outside the database.

Whoever can write to the database can drop its triggers, rewrite the log and compute its hashes
anew. They cannot sign: every few seconds the control worker signs (number of events, last hash) and
appends it to ``heads.ndjson`` in the data directory, and in a second place where one is set. A log
that was rewritten or cut no longer has the hashes that were signed.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from django.conf import settings

from apps.audit.models import AuditEvent, AuditHead
from esper.contracts import codec, signing
from esper.exceptions import CodecError, SignatureError

log = logging.getLogger(__name__)

FILE = "heads.ndjson"
MAX_LINE_BYTES = 1000
LINES_MAX = 4000  # then every second line of the older half goes: a later head covers it


@dataclass(frozen=True, slots=True)
class SignedHead:
    """At ``at`` the log had ``events`` events, and the hash of the last one was ``hash``."""

    events: int
    hash: str
    at: str
    signature: str

    def signed_bytes(self) -> bytes:
        """What the signature covers. The first line keeps it apart from other signed things."""
        content = {"events": self.events, "hash": self.hash, "at": self.at}
        return b"esper audit head\n" + codec.encode(content)


class HeadFileError(Exception):
    """A file of signed heads cannot be trusted; the message says where and why."""


def directories() -> list[Path]:
    """Where heads are kept: beside the database, and in a second place where one is set."""
    copies = [Path(settings.ESPER_AUDIT_COPY_DIR)] if settings.ESPER_AUDIT_COPY_DIR else []
    return [Path(settings.ESPER_AUDIT_DIR), *copies]


def trusted_keys() -> list[str]:
    """The public keys whose heads count: the present one, and those that it replaced."""
    return [signing.public_key(settings.ESPER_AUDIT_KEY), *settings.ESPER_AUDIT_OLD_KEYS]


def sign_head() -> SignedHead | None:
    """Sign the end of the log and append it to the files; None where nothing is new.

    A log that no longer has what was signed before is not signed: that would cover it up.
    """
    end = AuditHead.objects.filter(pk=1).first()
    if end is None or end.last_id == 0:
        return None
    first, *_ = directories()
    with _locked(first):
        known = read_heads(first / FILE, trusted_keys())
        newest = max(known, key=lambda head: head.events, default=None)
        if newest is not None:
            if newest.events == end.last_id and newest.hash == end.last_hash:
                return None
            if not _still_there(newest):
                log.error(
                    "the audit log no longer has the event %s that was signed at %s; no head was "
                    "signed. Run esper audit verify.",
                    newest.events,
                    newest.at,
                )
                return None
        head = _signed(end)
        for directory in directories():
            _keep(directory, head)
    return head


def read_heads(path: Path, keys: Sequence[str]) -> list[SignedHead]:
    """The heads of a file, oldest first; none where there is no file.

    Raises:
        HeadFileError: a line is malformed, or none of ``keys`` has signed it.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HeadFileError(f"{path} cannot be read: {error.strerror}") from error
    # What follows the last line break was cut by a crash while it was written.
    return [_parsed(line, keys, f"{path}, line {n}") for n, line in enumerate(lines[:-1], 1)]


def set_heads_aside() -> list[Path]:
    """Rename the files of heads, because a person has restored an older log; returns the new names.

    The files stay: they prove what the replaced log had.
    """
    renamed = []
    for directory in directories():
        path = directory / FILE
        if path.exists():
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
            renamed.append(path.rename(directory / f"heads-until-{stamp}.ndjson"))
    return renamed


def _still_there(head: SignedHead) -> bool:
    return AuditEvent.chain.filter(pk=head.events, hash=head.hash).exists()


def _signed(end: AuditHead) -> SignedHead:
    bare = SignedHead(end.last_id, end.last_hash, datetime.now(UTC).isoformat(), "")
    signature = signing.sign(bare.signed_bytes(), settings.ESPER_AUDIT_KEY)
    return SignedHead(bare.events, bare.hash, bare.at, signature)


def _parsed(line: bytes, keys: Sequence[str], place: str) -> SignedHead:
    try:
        members: Any = codec.decode(line, max_bytes=MAX_LINE_BYTES)
        head = SignedHead(**members)
        signed = head.signed_bytes()
    except (CodecError, TypeError) as error:
        raise HeadFileError(f"{place} is no signed head") from error
    for key in keys:
        try:
            signing.verify(signed, head.signature, key)
        except SignatureError:
            continue
        return head
    raise HeadFileError(f"{place}: the signature is not by the key of this installation")


def _keep(directory: Path, head: SignedHead) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _append(directory / FILE, codec.encode(asdict(head)) + b"\n")
    except OSError as error:  # the other place may still take it
        log.error("the signed head of the audit log was not written to %s: %s", directory, error)


def _append(path: Path, line: bytes) -> None:
    with path.open("a+b") as file:
        file.seek(0)
        lines = file.read().split(b"\n")
        if lines[-1]:  # a line that a crash has cut
            file.truncate(file.tell() - len(lines[-1]))
        if len(lines) > LINES_MAX:
            half = LINES_MAX // 2
            _replace(path, b"\n".join([*lines[:half:2], *lines[half:-1], line]))
            return
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One writer at a time: a periodic task may run twice."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (directory / "heads.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
