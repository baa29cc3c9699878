"""The only module that opens files with code. All other modules read data.

Machine code, Python sources and pickles can run any code when they are opened, and cannot be
inspected safely before. So no function here takes only a path or bytes: each takes a whole kernel
with its digest and the trusted key, and verifies it first. A test searches the source of all other
modules for the calls of this module.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.blueprints import Graft
from esper.compilation.archive import unpack_archive, write_files
from esper.compilation.key import capability, device_name
from esper.compilation.verify import PACKAGE_FILE, open_compiled, open_package
from esper.contracts import KernelKey
from esper.exceptions import CompilerMissingError, KernelError

FUNCTION_FILE = "fn.aotc"
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
MARCH = "march"  # Inductor's setting for the compiler's -march

_one_at_a_time = threading.Lock()  # the process's environment names the cache directory


class CompiledGraft:
    """A graft's ``combine`` as machine code. It has no weights; it uses the graft's.

    Args:
        code: ``(graft, x, y) -> y'``.
        key: what it was compiled for; the eager graft handles all other calls.
    """

    def __init__(self, code: Any, key: KernelKey) -> None:
        self.key = key
        self._code = code
        self._dtype = getattr(torch, key.dtype)
        self._device = "cpu" if key.capability == "cpu" else "cuda"

    def fits(self, x: Tensor, y: Tensor) -> bool:
        """The call has the compiled shapes, dtype and device, with gradients on."""
        return (
            x.shape == self.key.in_shape
            and y.shape == self.key.out_shape
            and x.dtype == y.dtype == self._dtype
            and x.device.type == y.device.type == self._device
            and x.is_contiguous()
            and y.is_contiguous()
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled(self._device)
        )

    def __call__(self, graft: Graft, x: Tensor, y: Tensor) -> Tensor:
        # It was compiled for inputs that need gradients. If the input needs none, an unused
        # gradient is cheaper than a second kernel.
        combined: Tensor = self._code(graft, _with_gradient(x), _with_gradient(y))
        return combined


def load_compiled(files: Mapping[str, bytes], digest: str, trusted_key: str) -> CompiledGraft:
    """Verifies a compiled kernel, then opens it. Takes tens of milliseconds, too long for a step.

    Raises:
        KernelDigestError, SignatureError: it does not match the digest, or is not signed by the
            trusted key.
        KernelError: it was compiled for another device, PyTorch or Python.
        CompilerMissingError: PyTorch needs a C++ compiler to load it.
    """
    key, _, _, code = open_compiled(files, digest, trusted_key)
    check_made_for_here(key)
    contents = unpack_archive(code)
    if FUNCTION_FILE not in contents:
        raise KernelError("the archive contains no compiled function", digest=digest)
    root = Path(tempfile.mkdtemp(prefix="esper-compiled-"))
    try:
        write_files(contents, root)
        with inductor_in(root), portable_code():
            function = _load_function(contents[FUNCTION_FILE], digest)
        made_here = {str(path.relative_to(root)) for path in root.rglob("*.so")} - contents.keys()
        if made_here:
            raise KernelError("its machine code does not fit this host", digest=digest)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    compiled = CompiledGraft(function, key)
    # The files must live as long as the code: some are read late.
    weakref.finalize(compiled, shutil.rmtree, root, ignore_errors=True)
    return compiled


def load_exported(files: Mapping[str, bytes], digest: str, trusted_key: str) -> Any:
    """Verifies a package of :func:`esper.compilation.compile_export`, then opens it.

    Returns:
        A callable with the results of the exported model, without gradients.

    Raises:
        KernelDigestError, SignatureError: it does not match the digest, or is not signed by the
            trusted key.
        KernelError: it was compiled for another device or PyTorch.
    """
    manifest, package = open_package(files, digest, trusted_key)
    _check_package_made_for_here(manifest)
    with tempfile.TemporaryDirectory(prefix="esper-package-") as name:
        path = Path(name) / PACKAGE_FILE
        path.write_bytes(package)
        return torch._inductor.aoti_load_package(str(path))


def _check_package_made_for_here(manifest: Mapping[str, Any]) -> None:
    here = made_for(str(manifest["device"]))
    if {name: manifest[name] for name in here} != here:
        raise KernelError(f"the package was compiled for another machine; this is {here}")


def made_for(device: str) -> dict[str, str]:
    """What a package depends on, except its content."""
    return {
        "device": device,
        "device_name": device_name(torch.device(device)),
        "torch_version": torch.__version__,
    }


def check_made_for_here(key: KernelKey) -> None:
    """Raises ``KernelError`` unless this process matches the key."""
    device = torch.device("cpu" if key.capability == "cpu" else "cuda")
    theirs = (key.capability, key.device_name, key.torch_version, key.python_version)
    ours = (
        "cpu" if device.type == "cpu" else capability(),
        device_name(device),
        torch.__version__,
        platform.python_version(),
    )
    if theirs != ours:
        raise KernelError(f"it was compiled for {', '.join(theirs)}; this is {', '.join(ours)}")


@contextmanager
def inductor_in(directory: Path) -> Iterator[None]:
    """Inside the block, Inductor reads and writes its files in ``directory``."""
    with _one_at_a_time:
        before = os.environ.get(CACHE_VARIABLE)
        os.environ[CACHE_VARIABLE] = str(directory)
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(CACHE_VARIABLE, None)
            else:
                os.environ[CACHE_VARIABLE] = before


def portable_code() -> Any:
    """Compiler options by instruction set; Inductor's own "native" may not run on other hosts.

    They are part of the names of Inductor's files, so builder and loader must use the same. Before
    2.13 torch has no such setting, and its code runs on the kind of machine that built it: a
    kernel's key names torch's version and the device.
    """
    from torch._inductor import config

    if not hasattr(config.cpp, MARCH):
        return nullcontext()
    levels = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
    march = levels.get(torch.backends.cpu.get_cpu_capability())
    return config.patch({f"cpp.{MARCH}": march})


def _load_function(data: bytes, digest: str) -> Any:
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return torch.compiler.load_compiled_function(io.BytesIO(data))
    except InvalidCxxCompiler as error:
        raise CompilerMissingError(
            "this machine has no C++ compiler, which PyTorch asks for", digest=digest
        ) from error
    except Exception as error:  # pickles of PyTorch's internal classes can raise any exception
        text = f"PyTorch could not load it: {type(error).__name__}: {error}"
        raise KernelError(text[:300], digest=digest) from error


def _with_gradient(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()
