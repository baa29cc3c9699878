"""Kernels: specialise -> certify -> measure -> package -> sign; and how to take one in safely.

``bundle``, ``verify``, ``store`` and ``builder`` import no torch, so that the web process may
serve kernels and a worker may have them built by children.
The other direction, recipe -> module, is ``esper.compilation.instantiate.instantiate``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.compilation.build import build_kernel, draft_kernel, warm_up
    from esper.compilation.builder import Builder, BuilderPool, BuildLimits, BuildOrder
    from esper.compilation.key import capability, kernel_key
    from esper.compilation.store import KernelStore
    from esper.compilation.verify import open_kernel

_HOMES = {
    "BuildLimits": "builder",
    "BuildOrder": "builder",
    "Builder": "builder",
    "BuilderPool": "builder",
    "KernelStore": "store",
    "build_kernel": "build",
    "capability": "key",
    "draft_kernel": "build",
    "kernel_key": "key",
    "open_kernel": "verify",
    "warm_up": "build",
}

__all__ = [
    "BuildLimits",
    "BuildOrder",
    "Builder",
    "BuilderPool",
    "KernelStore",
    "build_kernel",
    "capability",
    "draft_kernel",
    "kernel_key",
    "open_kernel",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
