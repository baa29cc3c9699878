"""The checks of a command, in the order of ``docs/protocol.md``.

signature -> run -> epoch -> sequence -> expiry -> the trainer's own veto
                                                     (mode, pause; kernels are checked later)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esper.contracts import Command, CommandKind, RefusalCode, RunMode, signing
from esper.exceptions import CodecError, CommandRefusedError, SignatureError
from esper.remedies import list_remedies


@dataclass(frozen=True, slots=True)
class Trust:
    """What a registration fixed: whose signatures count, and for which start of the run."""

    run: str
    epoch: int
    command_key: str
    kernel_key: str


@dataclass(slots=True)
class LocalVeto:
    """The trainer's own limits on changes; a server cannot overrule them."""

    mode: RunMode
    paused: bool = False
    # The workers whose machine code may run in this process, by their public key. It stands in the
    # trainer's own environment: a server that names a key itself must not be able to run code.
    code_key: str = ""

    def check(self, command: Command) -> None:
        """Raises ``CommandRefusedError`` for a change that this trainer does not allow."""
        if command.kind not in (CommandKind.GRAFT, CommandKind.SPEED_UP, CommandKind.REMEDY):
            return
        if self.mode is RunMode.OBSERVE and not _changes_nothing(command):
            raise CommandRefusedError(
                RefusalCode.MODE_FORBIDS, "this run was attached to observe, never to be changed"
            )
        if self.paused:
            raise CommandRefusedError(RefusalCode.PAUSED, "adaptation is paused in this run")
        if command.kind is CommandKind.SPEED_UP and not self.code_key:
            raise CommandRefusedError(
                RefusalCode.NO_FOREIGN_CODE, "ESPER_COMPILED_KERNEL_KEY is not set in this trainer"
            )


def _changes_nothing(command: Command) -> bool:
    """A remedy that only measures or saves, which a run that is observed allows too."""
    slug = str(command.payload.get("remedy"))
    return command.kind is CommandKind.REMEDY and any(
        known.slug == slug and known.changes_nothing for known in list_remedies()
    )


def parse_command(raw: Any) -> Command:
    """The command as it arrived, not yet verified; raises ``CommandRefusedError``."""
    try:
        return Command.from_wire(raw)
    except CodecError as error:
        raise CommandRefusedError(RefusalCode.MALFORMED, str(error)) from error


def verify_command(
    command: Command, signature: str, trust: Trust, *, last_seq: int, now: float
) -> None:
    """Returns when the command is genuine, new, in time, and for this start of this run.

    Args:
        last_seq: the last command that the journal holds.
        now: seconds since the epoch by the server's clock.

    Raises:
        CommandRefusedError: with the first reason that applies.
    """
    try:
        signing.verify(command.signing_bytes(), signature, trust.command_key)
    except (SignatureError, CodecError) as error:
        raise CommandRefusedError(RefusalCode.BAD_SIGNATURE, str(error)) from error
    if command.run != trust.run:
        raise CommandRefusedError(RefusalCode.FOREIGN_RUN, "the command is for another run")
    if command.epoch != trust.epoch:
        raise CommandRefusedError(
            RefusalCode.OLD_EPOCH,
            f"the command is for start {command.epoch} of this run, this is start {trust.epoch}",
        )
    if command.seq <= last_seq:
        raise CommandRefusedError(
            RefusalCode.REPLAYED, f"command {command.seq} comes after {last_seq} was taken"
        )
    if now >= command.expires_at:
        late = now - command.expires_at
        raise CommandRefusedError(RefusalCode.EXPIRED, f"the command expired {late:.1f} s ago")
