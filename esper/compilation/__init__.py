"""Kernels: specialise -> certify -> measure -> package -> sign; and how to take one in safely.

``bundle``, ``verify`` and ``store`` import no torch, so that the web process may serve kernels.
The other direction, recipe -> module, is ``esper.compilation.instantiate.instantiate``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.compilation.build import build_kernel, warm_up
    from esper.compilation.key import capability, kernel_key
    from esper.compilation.store import KernelStore
    from esper.compilation.verify import open_kernel

_HOMES = {
    "KernelStore": "store",
    "build_kernel": "build",
    "capability": "key",
    "kernel_key": "key",
    "open_kernel": "verify",
    "warm_up": "build",
}

__all__ = [
    "KernelStore",
    "build_kernel",
    "capability",
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
