"""What the server tells a trainer, and what the trainer answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from esper.contracts import codec
from esper.contracts.enums import CommandKind, CommandState
from esper.contracts.kernels import Certificate
from esper.exceptions import CodecError


@dataclass(frozen=True, slots=True)
class Command:
    """One order in a run's command log; signed as a whole.

    Attributes:
        epoch: counts the trainer's (re)starts; a command of an older epoch is refused.
        seq: position in the run's log; never applied twice, never out of order.
        kernel_digest: hex SHA-256 of the kernel's manifest for ``graft`` and ``speed_up``.
        issued_at, expires_at: seconds since the epoch, server's clock.
    """

    run: str
    epoch: int
    seq: int
    kind: CommandKind
    issued_at: float
    expires_at: float
    adaptation: str = ""
    layer: str = ""
    kernel_digest: str = ""
    payload: dict[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "epoch": self.epoch,
            "seq": self.seq,
            "kind": str(self.kind),
            "issued_at": self.issued_at,
            "expires_at": self.expires_at,
            "adaptation": self.adaptation,
            "layer": self.layer,
            "kernel_digest": self.kernel_digest,
            "payload": self.payload,
        }

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Command:
        try:
            return cls(**{**data, "kind": CommandKind(data["kind"])})
        except (TypeError, KeyError, ValueError) as error:
            raise CodecError(f"not a command: {error}") from error

    def signing_bytes(self) -> bytes:
        """What is signed: the canonical JSON of all of it, with a word that says what it is."""
        return b"esper-command-1\n" + codec.encode(self.to_wire())


@dataclass(frozen=True, slots=True)
class CommandAck:
    """The trainer's answer. ``step`` and ``pause_ms`` are set once something was done.

    ``speedup`` answers ``speed_up``: eager time over compiled time, measured in this trainer.
    """

    seq: int
    state: CommandState
    step: int = -1
    pause_ms: float = 0.0
    code: str = ""  # RefusalCode
    reason: str = ""
    certificate: Certificate | None = None
    digest_before: str = ""  # SHA-256 of the model's named tensors
    digest_after: str = ""
    speedup: float | None = None

    def to_wire(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "state": str(self.state),
            "step": self.step,
            "pause_ms": self.pause_ms,
            "code": self.code,
            "reason": self.reason,
            "certificate": self.certificate.to_wire() if self.certificate else None,
            "digest_before": self.digest_before,
            "digest_after": self.digest_after,
            "speedup": self.speedup,
        }
