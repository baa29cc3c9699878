"""Tier 2: a finished model as one AOTInductor package. For inference only, without gradients.

    model = esper.export(trained)
    package = compile_export(model, (batch,), private_key=key)
    run = load_exported(package.files, package.digest, trusted_key)

A package is native code that includes the weights. It takes seconds to minutes to build (measured
on
two cores: 10 to 40 s for a small network) and is larger than the weights. It is valid for one kind
of device, one PyTorch version, and the shapes of the sample.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.compilation.native import made_for, portable_code
from esper.compilation.verify import PACKAGE_FILE, PACKAGE_FORMAT
from esper.contracts import codec, signing
from esper.contracts.kernels import MANIFEST_FILE, SIGNATURE_FILE
from esper.exceptions import CompilerMissingError, ConfigurationError, KernelBuildError
from esper.grafting.slot import slots


@dataclass(frozen=True, slots=True)
class Package:
    """The signed files, in memory; ``build_seconds`` and ``size_bytes`` are measured."""

    files: dict[str, bytes]
    build_seconds: float

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.files[MANIFEST_FILE]).hexdigest()

    @property
    def size_bytes(self) -> int:
        return len(self.files[PACKAGE_FILE])


def compile_export(model: nn.Module, sample: tuple[Tensor, ...], *, private_key: str) -> Package:
    """Compile a model of ``esper.export`` and sign the result. Blocks for seconds to minutes.

    Args:
        model: in its later mode; ``eval()`` for most.
        sample: its arguments; their shapes and dtypes become fixed.
        private_key: base64 Ed25519 key of the compile worker.

    Raises:
        ConfigurationError: the model still has Esper's slots, or the key is not valid.
        CompilerMissingError: this machine has no compiler.
        KernelBuildError: permanent: PyTorch cannot export or compile it.
    """
    if any(True for _ in slots(model)):
        raise ConfigurationError("this model still has slots; compile esper.export(model)")
    device = next((str(p.device) for p in model.parameters()), "cpu")
    started = time.perf_counter()
    package = _compile(model, sample)
    manifest = codec.encode(
        {
            "format": PACKAGE_FORMAT,
            **made_for(device),
            "inputs": [[list(tensor.shape), str(tensor.dtype)] for tensor in sample],
            "bytes": len(package),
            "sha256": hashlib.sha256(package).hexdigest(),
        }
    )
    files = {
        MANIFEST_FILE: manifest,
        SIGNATURE_FILE: signing.sign(manifest, private_key).encode("ascii"),
        PACKAGE_FILE: package,
    }
    return Package(files, time.perf_counter() - started)


def _compile(model: nn.Module, sample: tuple[Tensor, ...]) -> bytes:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    compile_and_package: Any = aoti_compile_and_package
    with tempfile.TemporaryDirectory(prefix="esper-package-") as name, torch.no_grad():
        path = Path(name) / PACKAGE_FILE
        try:
            program = torch.export.export(model, sample)
            with portable_code():
                compile_and_package(program, package_path=str(path))
        except InvalidCxxCompiler as error:
            raise CompilerMissingError(f"this machine has no C++ compiler: {error}") from error
        except Exception as error:  # PyTorch's compiler can raise any exception
            text = f"PyTorch cannot compile it: {type(error).__name__}: {error}"
            raise KernelBuildError(text[:500], permanent=True) from error
        return path.read_bytes()
