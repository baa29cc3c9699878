"""Esper: watch a network train, layer by layer, and change its architecture while it does.

Everything is loaded on first use, so that ``import esper.contracts`` never imports torch.
"""

from __future__ import annotations

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

from esper.version import __version__

if TYPE_CHECKING:
    from esper import blueprints as blueprints
    from esper.grafting import graft as graft
    from esper.grafting import load_state_dict as load_state_dict
    from esper.sdk import Session as Session
    from esper.sdk import attach as attach
    from esper.sdk.export import export as export
    from esper.sdk.export.generating import int8_cache as int8_cache
    from esper.sdk.shadow import Shadow as Shadow

__all__ = [
    "Session",
    "Shadow",
    "__version__",
    "attach",
    "blueprints",
    "export",
    "graft",
    "int8_cache",
    "load_state_dict",
]

# public name -> the module that holds it
_HOMES = {
    "attach": "esper.sdk",
    "Session": "esper.sdk",
    "Shadow": "esper.sdk.shadow",
    "export": "esper.sdk.export",
    "graft": "esper.grafting",
    "load_state_dict": "esper.grafting",
    "int8_cache": "esper.sdk.export.generating",  # needs transformers
}


def __getattr__(name: str) -> Any:
    if name == "blueprints":
        return _loaded("esper.blueprints")
    if name not in _HOMES:
        raise AttributeError(f"module 'esper' has no attribute {name!r}")
    return getattr(_loaded(_HOMES[name]), name)


def _loaded(module: str) -> Any:
    """The module; the script has often set its seed before, and some libraries draw when loaded.

    One is rich, which httpx loads where it is installed.
    """
    state = random.getstate()
    try:
        return import_module(module)
    finally:
        random.setstate(state)


def __dir__() -> list[str]:
    return sorted(__all__)
