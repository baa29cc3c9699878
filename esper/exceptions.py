"""Every error that Esper raises on purpose.

EsperError
├── ConfigurationError            a setting or argument is not valid; nothing was started
├── CodecError                    bytes or numbers that must not be sent or accepted
│   └── MessageError              pointer, reason (a message does not fit its type)
├── BlueprintError                slug
│   ├── UnknownBlueprintError
│   ├── DuplicateBlueprintError
│   └── IncompatibleLayerError    layer, blueprint, reason
├── UnknownAdaptationTypeError    adaptation_type
├── GraftError                    layer
│   ├── UnknownLayerError
│   ├── CertificateError          certificate (why the graft was not applied)
│   ├── UndoError                 the model could not be brought back
│   └── ReplicaError              a rank could not make a change, so no rank made it
├── PlanError                     stays (a plan could not be applied, or not be undone, as a whole)
├── KernelError                   digest
│   ├── KernelBuildError          permanent (False: worth another attempt)
│   │   ├── BuilderLostError      log, wanted (the child process has ended)
│   │   └── CompilerMissingError  compiled kernels are unavailable on this machine
│   ├── KernelDigestError         the content does not match its digest
│   ├── StoreUnavailableError     the kernel store does not answer
│   └── SignatureError            not signed by a trusted key
├── CommandRefusedError           code, reason (a trainer refuses a command)
└── TransportError                permanent, retry_after, status
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class EsperError(Exception):
    """Base of all errors below."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own would call the class with the message alone. A pool of processes waits
        # forever for an error that cannot be unpickled.
        return _rebuilt, (type(self), self.args, vars(self))


def _rebuilt(kind: type[EsperError], args: tuple[Any, ...], state: dict[str, Any]) -> EsperError:
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class ConfigurationError(EsperError):
    """A setting or argument is not valid; nothing was started."""


class CodecError(EsperError, ValueError):
    """Bytes or numbers that must not be sent or accepted (NaN, depth, size, duplicate keys)."""


class MessageError(CodecError):
    """A message does not fit its type.

    Attributes:
        reason: what is wrong.
        pointer: JSON pointer to the first fault; empty: the message as a whole.
    """

    def __init__(self, reason: str, *, pointer: str) -> None:
        super().__init__(f"{pointer}: {reason}" if pointer else reason)
        self.reason = reason
        self.pointer = pointer


class BlueprintError(EsperError):
    """Something is wrong with a blueprint; ``slug`` names it."""

    def __init__(self, message: str, *, slug: str) -> None:
        super().__init__(message)
        self.slug = slug


class UnknownBlueprintError(BlueprintError, KeyError):
    """No blueprint has this slug or id."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class DuplicateBlueprintError(BlueprintError):
    """Two blueprints claim one slug or id, or a slug is not its file's name."""


class IncompatibleLayerError(BlueprintError):
    """The blueprint does not fit the layer; ``reason`` is a sentence for a person."""

    def __init__(self, *, layer: str, blueprint: str, reason: str) -> None:
        super().__init__(f"{blueprint} cannot be grafted into {layer!r}: {reason}", slug=blueprint)
        self.layer = layer
        self.blueprint = blueprint
        self.reason = reason


class UnknownAdaptationTypeError(EsperError, ValueError):
    """An adaptation type that is not declared; there is no default."""

    def __init__(self, adaptation_type: str, known: Iterable[str]) -> None:
        names = ", ".join(known)
        super().__init__(f"unknown adaptation type {adaptation_type!r}; known are: {names}")
        self.adaptation_type = adaptation_type


class GraftError(EsperError):
    """A graft could not be made or removed; ``layer`` names the place."""

    def __init__(self, message: str, *, layer: str) -> None:
        super().__init__(message)
        self.layer = layer


class UnknownLayerError(GraftError, KeyError):
    """The model has no such layer, or the layer never ran in the trace."""

    def __str__(self) -> str:
        return str(self.args[0])


class CertificateError(GraftError):
    """The graft would break a point of the graft contract, so it was not applied.

    Attributes:
        certificate: the failed ``contracts.Certificate``. Untyped here: contracts stand above
            this module.
    """

    def __init__(self, *, layer: str, certificate: Any) -> None:
        super().__init__(
            f"graft into {layer!r} refused by its certificate: {'; '.join(certificate.failures)}",
            layer=layer,
        )
        self.certificate = certificate


class UndoError(GraftError):
    """The model could not be brought back to its snapshot."""


class ReplicaError(GraftError):
    """The ranks of a model disagree, so nothing was changed on any of them."""

    def __init__(self, message: str, *, layer: str = "") -> None:
        super().__init__(message, layer=layer)


class PlanError(EsperError):
    """A plan of several changes could not be applied, or not be undone, as a whole.

    Attributes:
        stays: layers with a graft of the plan that could not be taken out again.
    """

    def __init__(self, message: str, *, stays: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.stays = stays


class KernelError(EsperError):
    """Something is wrong with a kernel; ``digest`` names it where one is known."""

    def __init__(self, message: str, *, digest: str = "") -> None:
        super().__init__(message)
        self.digest = digest


class KernelBuildError(KernelError):
    """A kernel could not be built; ``permanent`` says that trying again is useless."""

    def __init__(self, message: str, *, permanent: bool, digest: str = "") -> None:
        super().__init__(message, digest=digest)
        self.permanent = permanent


class BuilderLostError(KernelBuildError):
    """The building process is gone; another attempt with another process may succeed.

    Attributes:
        log: the last lines of its output.
        wanted: the process was ended on purpose, because its result is no longer needed.
    """

    def __init__(self, message: str, *, log: str, wanted: bool = False) -> None:
        super().__init__(message, permanent=False)
        self.log = log
        self.wanted = wanted


class CompilerMissingError(KernelBuildError):
    """This machine has no compiler, so it makes no compiled kernels. Not a failure."""

    def __init__(self, message: str, *, digest: str = "") -> None:
        super().__init__(message, permanent=True, digest=digest)


class KernelDigestError(KernelError):
    """A file's content does not match the digest that it was asked for by."""


class StoreUnavailableError(KernelError):
    """The kernel store does not answer; its content is unknown."""


class SignatureError(KernelError):
    """A kernel or a command is not signed by a trusted key."""


class AttestationError(EsperError):
    """The signed record of a decision is not what it claims to be."""


class CommandRefusedError(EsperError):
    """A trainer refuses a command; ``code`` is a ``contracts.RefusalCode``."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class TransportError(EsperError):
    """The server could not be reached, or refused the request.

    Attributes:
        permanent: the same request will never succeed.
        retry_after: seconds to wait, where the server named them.
        status: HTTP status, 0 where there was no answer.
        code: the problem's ``code``, empty where there was none.
    """

    def __init__(
        self,
        message: str,
        *,
        permanent: bool,
        retry_after: float | None = None,
        status: int = 0,
        code: str = "",
    ) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.retry_after = retry_after
        self.status = status
        self.code = code
