"""Commands of the server to a trainer, and the trainer's acknowledgements."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from msgspec import Meta

from esper.contracts import codec, wire
from esper.contracts.enums import CommandKind, CommandState
from esper.contracts.kernels import Certificate
from esper.contracts.wire import Digest, Number, Whole
from esper.exceptions import MessageError


@dataclass(frozen=True, slots=True)
class Command:
    """One entry in a run's command log; signed as a whole.

    Attributes:
        run: uid of the run that the command is for.
        epoch: counts the trainer's (re)starts; a command of an older epoch is refused.
        seq: position in the run's log; never applied twice, never out of order.
        kind: what the trainer must do.
        issued_at, expires_at: seconds since the epoch, server's clock.
        adaptation: uid of the adaptation; empty where none is concerned.
        layer: layer of the adaptation.
        kernel_digest: hex SHA-256 of the kernel's manifest for ``graft`` and ``speed_up``.
        payload: members that depend on the kind.
    """

    run: str
    epoch: Whole
    seq: Whole
    kind: CommandKind
    # An integer stays an integer: 5 and 5.0 are different bytes, and the signature is over the
    # bytes.
    issued_at: int | float
    expires_at: int | float
    adaptation: str = ""
    layer: str = ""
    kernel_digest: str = ""
    payload: dict[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        members: dict[str, Any] = wire.to_wire(self)
        return members

    @classmethod
    def from_wire(cls, data: Any) -> Command:
        """Raises ``MessageError``, also for an unknown member: the signature is over all of it."""
        unknown = sorted(data.keys() - _MEMBERS) if isinstance(data, dict) else ()
        if unknown:
            raise MessageError("There is no such member.", pointer=f"/{unknown[0]}")
        return wire.from_wire(cls, data)

    def signing_bytes(self) -> bytes:
        """The signed bytes: canonical JSON of all members, after a word that names the message."""
        return b"esper-command-1\n" + codec.encode(self.to_wire())


_MEMBERS = frozenset(member.name for member in fields(Command))


@dataclass(frozen=True, slots=True)
class CommandAck:
    """The trainer's answer to a command.

    Attributes:
        seq: of the command.
        state: how far the trainer is with it.
        step: the step at which the command was carried out, -1 if it was not.
        pause_ms: how long the training was paused.
        code: a refusal code, empty unless the command was refused.
        reason: a sentence for a person.
        certificate: what the trial of the graft measured.
        digest_before, digest_after: SHA-256 of the model's named tensors.
        speedup: of ``speed_up``: eager time over compiled time, measured in this trainer.
        details: of ``remedy``: numbers and words that tell what was done; of ``undo``:
            ``back_to_step``, whose weights the model has again, where it does.
    """

    seq: Whole
    state: CommandState
    step: Annotated[int, Meta(ge=-1, le=2**63 - 1)] = -1
    pause_ms: Number = 0.0
    code: Annotated[str, Meta(max_length=30)] = ""
    reason: Annotated[str, Meta(max_length=4000)] = ""
    certificate: Certificate | None = None
    digest_before: Digest = ""
    digest_after: Digest = ""
    speedup: Number | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        members: dict[str, Any] = wire.to_wire(self)
        if self.certificate is not None:
            members["certificate"] = self.certificate.to_wire()  # says whether it has passed
        return members
