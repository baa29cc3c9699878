"""A kernel: a blueprint made ready for one layer's shape, dtype and device.

A bundle is four small files. Each is fetched by name and checked against the manifest, so there is
no archive to unpack, and no file contains code:

    manifest.json   canonical JSON: key, names, sizes and SHA-256 of the other files
    manifest.sig    Ed25519 over manifest.json, base64
    recipe.json     blueprint, version, configuration, seed
    report.json     certificate, forecast and measured cost, stage times

A compiled kernel (tier 1) has a fifth file with code for one kind of device:

    inductor.tar    machine code of forward and backward, opened only by esper.compilation.native

A draft is a kernel without a signature: a builder child makes it, its worker checks and signs it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypeAlias

from msgspec import Meta

from esper.contracts import codec, wire
from esper.contracts.decisions import CostForecast
from esper.contracts.wire import Number, Whole
from esper.exceptions import CodecError

MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
SPEC_FILE = "recipe.json"
REPORT_FILE = "report.json"
BUNDLE_FILES = (MANIFEST_FILE, SIGNATURE_FILE, SPEC_FILE, REPORT_FILE)
MAX_FILE_BYTES = 64 * 1024
CODE_FILE = "inductor.tar"
COMPILED_FILES = (*BUNDLE_FILES, CODE_FILE)
MAX_CODE_BYTES = 32 * 1024 * 1024


def size_limit(name: str) -> int:
    """The most bytes that a reader accepts for the file of that name."""
    return MAX_CODE_BYTES if name == CODE_FILE else MAX_FILE_BYTES


_Failure: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4000)]


@dataclass(frozen=True, slots=True)
class Certificate:
    """The measured five points of the graft contract.

    Attributes:
        max_abs_diff: max |f'(x) - f(x)| right after the graft.
        tolerance: the allowed difference; 0 for grafts beside the host.
        preserving: right after the graft, the output is the host's.
        live: at least one new tensor has a gradient at step 0 (or nothing is trainable).
        rng_neutral: building it did not advance the host's random streams.
        undo_exact: after undo every tensor equals the snapshot; None where not tried.
        host_untouched: gradients of the host are those without the graft; None where not tried.
        parameters: added parameters.
        parameters_declared: by the blueprint's formula.
        memory_mib, latency_ms: measured; NaN where not measured.
        failures: one sentence for each point that does not hold.
    """

    max_abs_diff: Number
    tolerance: Number
    preserving: bool
    live: bool
    rng_neutral: bool
    parameters: Whole
    parameters_declared: Whole
    undo_exact: bool | None = None
    host_untouched: bool | None = None
    memory_mib: Number = math.nan
    latency_ms: Number = math.nan
    failures: Annotated[tuple[_Failure, ...], Meta(max_length=100)] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_wire(self) -> dict[str, Any]:
        return {**wire.to_wire(self), "passed": self.passed}

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Certificate:
        """Raises ``MessageError``."""
        return wire.from_wire(cls, data)


@dataclass(frozen=True, slots=True)
class KernelKey:
    """Everything that a kernel depends on; equal keys may share a kernel."""

    blueprint: str
    blueprint_version: str  # SHA-256 of the blueprint's source, first 16 hex digits
    config: dict[str, Any]
    layer_kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: str
    capability: str  # "cpu", "cuda.sm90"
    device_name: str
    torch_version: str
    python_version: str
    tier: int = 0

    def to_wire(self) -> dict[str, Any]:
        return {**asdict(self), "in_shape": list(self.in_shape), "out_shape": list(self.out_shape)}

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> KernelKey:
        try:
            return cls(
                **{
                    **data,
                    "in_shape": tuple(data["in_shape"]),
                    "out_shape": tuple(data["out_shape"]),
                }
            )
        except (TypeError, KeyError) as error:
            raise CodecError(f"not a kernel key: {error}") from error

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the canonical key: the cache's index."""
        return hashlib.sha256(codec.encode(self.to_wire())).hexdigest()


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What the trainer needs to build the module from its own copy of the blueprint's code."""

    blueprint: str
    blueprint_version: str
    config: dict[str, Any]
    seed: int


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """Cost of the graft alone at the layer's real shape on the worker's device; NaN: unknown.

    Attributes:
        forward_p50_ms, forward_p95_ms: one forward pass.
        backward_p50_ms, backward_p95_ms: one backward pass through the graft and to its input.
        peak_memory_mib: peak allocation of one forward and backward pass:
            activations and gradients, without the weights and the layer's own tensors.
    """

    forward_p50_ms: Number = math.nan
    forward_p95_ms: Number = math.nan
    backward_p50_ms: Number = math.nan
    backward_p95_ms: Number = math.nan
    peak_memory_mib: Number = math.nan

    def to_wire(self) -> dict[str, Any]:
        members: dict[str, Any] = wire.to_wire(self)
        return members

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> MeasuredCost:
        """Raises ``MessageError``."""
        return wire.from_wire(cls, data)


@dataclass(frozen=True, slots=True)
class KernelReport:
    """The worker's measurements.

    Attributes:
        tier: 0: validated and packaged; 1: compiled for one device.
        stage_ms: milliseconds of each stage of the build, by name.
        speedup: tier 1: the eager graft's time over the compiled one's, forward and backward, on
            the worker's device; NaN where it was not measured.
    """

    certificate: Certificate
    forecast: CostForecast
    tier: int = 0
    stage_ms: dict[str, float] = field(default_factory=dict)
    speedup: float = math.nan
    measured: MeasuredCost = field(default_factory=MeasuredCost)


@dataclass(frozen=True, slots=True)
class KernelBundle:
    """The files of one kernel, in memory. ``digest`` (hex SHA-256 of the manifest) is its name."""

    files: dict[str, bytes]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.files[MANIFEST_FILE]).hexdigest()


@dataclass(frozen=True, slots=True)
class KernelDraft:
    """A kernel without a signature."""

    key: KernelKey
    spec: KernelSpec
    report: KernelReport
