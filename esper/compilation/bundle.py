"""A kernel's files: how they are written and parsed. Imports no torch.

``pack`` is the only writer. The readers here check only the form; signature and digests are checked
before, by :func:`esper.compilation.verify.open_kernel`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from typing import Any

from esper.contracts import (
    Certificate,
    CostForecast,
    KernelBundle,
    KernelDraft,
    KernelReport,
    KernelSpec,
    MeasuredCost,
    codec,
    signing,
)
from esper.contracts.kernels import (
    CODE_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    SIGNATURE_FILE,
    SPEC_FILE,
    size_limit,
)
from esper.exceptions import CodecError, KernelBuildError

FORMAT = "esper-kernel-1"
LISTED_FILES = (SPEC_FILE, REPORT_FILE)  # the manifest has their digests
LISTED_COMPILED_FILES = (*LISTED_FILES, CODE_FILE)


def pack(draft: KernelDraft, *, private_key: str, code: bytes | None = None) -> KernelBundle:
    """Write, hash and sign the files of one kernel.

    Args:
        code: the ``inductor.tar`` of a compiled kernel.
        private_key: base64 Ed25519 key of the compile worker.

    Raises:
        KernelBuildError: a file is larger than readers accept.
        ConfigurationError: the key is not valid.
    """
    files = {
        SPEC_FILE: codec.encode(asdict(draft.spec)),
        REPORT_FILE: codec.encode(report_to_wire(draft.report)),
    }
    if code is not None:
        files[CODE_FILE] = code
    files[MANIFEST_FILE] = codec.encode(
        {
            "format": FORMAT,
            "key": draft.key.to_wire(),
            "files": {name: _entry(data) for name, data in files.items()},
        }
    )
    for name, data in files.items():
        if len(data) > size_limit(name):
            raise KernelBuildError(
                f"{name} has {len(data)} bytes, at most {size_limit(name)} are taken",
                permanent=True,
            )
    files[SIGNATURE_FILE] = signing.sign(files[MANIFEST_FILE], private_key).encode("ascii")
    return KernelBundle(files)


def report_to_wire(report: KernelReport) -> dict[str, Any]:
    return {
        "certificate": report.certificate.to_wire(),
        "forecast": report.forecast.to_wire(),
        "tier": report.tier,
        "stage_ms": report.stage_ms,
        "speedup": codec.number_to_wire(report.speedup),
        "measured": report.measured.to_wire(),
    }


def report_from_wire(data: dict[str, Any]) -> KernelReport:
    """Raises ``CodecError`` if it is not a report."""
    try:
        return KernelReport(
            certificate=Certificate.from_wire(data["certificate"]),
            forecast=CostForecast.from_wire(data["forecast"]),
            tier=int(data["tier"]),
            stage_ms={
                str(name): codec.number_from_wire(value) for name, value in data["stage_ms"].items()
            },
            # Kernels that were signed before tier 1 existed do not name it.
            speedup=codec.number_from_wire(data.get("speedup", math.nan)),
            measured=MeasuredCost.from_wire(data.get("measured", {})),
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CodecError(f"not a kernel report: {error}") from error


def spec_from_wire(data: Any) -> KernelSpec:
    """Raises ``CodecError`` if it is not a kernel spec."""
    types = {"blueprint": str, "blueprint_version": str, "config": dict, "seed": int}
    if not isinstance(data, dict) or data.keys() != types.keys():
        raise CodecError(f"a kernel spec has the fields {', '.join(types)}")
    for name, kind in types.items():
        if type(data[name]) is not kind:  # a bool is an int to isinstance
            raise CodecError(f"{name} of a kernel spec is a {kind.__name__}")
    return KernelSpec(**data)


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
