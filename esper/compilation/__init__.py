"""Kernels: specialise -> certify -> measure -> package -> sign; and verify before use.

    tier 0   build_kernel     spec and certificate, no code
    tier 1   build_compiled   the same with machine code for one device, used where it is faster
    tier 2   compile_export   the finished model as one package, for inference only

``bundle``, ``verify``, ``store`` and ``builder`` import no torch, so that the web process can
serve kernels and a worker can build them in child processes.
The other direction, spec -> module, is ``esper.compilation.instantiate.instantiate``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.compilation.build import build_kernel, draft_kernel, warm_up
    from esper.compilation.builder import Builder, BuilderPool, BuildLimits, BuildOrder
    from esper.compilation.exported import compile_export
    from esper.compilation.inductor import build_compiled, compiled_key
    from esper.compilation.key import capability, kernel_key
    from esper.compilation.native import CompiledGraft, load_compiled, load_exported
    from esper.compilation.store import KernelStore
    from esper.compilation.trial import Trial, try_compiled
    from esper.compilation.verify import open_compiled, open_kernel

_HOMES = {
    "CompiledGraft": "native",
    "BuildLimits": "builder",
    "BuildOrder": "builder",
    "Builder": "builder",
    "BuilderPool": "builder",
    "KernelStore": "store",
    "Trial": "trial",
    "build_compiled": "inductor",
    "build_kernel": "build",
    "capability": "key",
    "compile_export": "exported",
    "compiled_key": "inductor",
    "draft_kernel": "build",
    "kernel_key": "key",
    "load_compiled": "native",
    "load_exported": "native",
    "open_compiled": "verify",
    "open_kernel": "verify",
    "try_compiled": "trial",
    "warm_up": "build",
}

__all__ = [
    "BuildLimits",
    "BuildOrder",
    "Builder",
    "BuilderPool",
    "CompiledGraft",
    "KernelStore",
    "Trial",
    "build_compiled",
    "build_kernel",
    "capability",
    "compile_export",
    "compiled_key",
    "draft_kernel",
    "kernel_key",
    "load_compiled",
    "load_exported",
    "open_compiled",
    "open_kernel",
    "try_compiled",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
