"""Write the import contracts of ``pyproject.toml`` into ``docs/architecture.md``.

python -m scripts.architecture_docs            write
python -m scripts.architecture_docs --check    exit 1 where the file differs

What stands between the two marks is generated; everything else is written by hand.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.generated_page import write_or_check

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- layers: generated -->", "<!-- layers: end -->"


def render() -> str:
    """The whole file, with the contracts as they are now."""
    text = TARGET.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{chr(10).join(_sections())}\n{END}{after}"


def _sections() -> Iterator[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in settings["tool"]["importlinter"]["contracts"]:
        yield f"\n### {contract['name']}\n"
        yield from _KINDS[contract["type"]](contract)


def _layers(contract: dict[str, Any]) -> Iterator[str]:
    containers = contract.get("containers", [])
    if len(containers) == 1:
        yield f"In `{containers[0]}`:\n"
    yield "\n".join(["```text", *contract["layers"], "```"])


def _forbidden(contract: dict[str, Any]) -> Iterator[str]:
    left, right = _names(contract["source_modules"]), _names(contract["forbidden_modules"])
    yield f"{left} must not import {right}."


def _independence(contract: dict[str, Any]) -> Iterator[str]:
    yield f"{_names(contract['modules'])} must not import each other."


def _protected(contract: dict[str, Any]) -> Iterator[str]:
    who = _names(contract["allowed_importers"]) or "nothing else"
    yield f"{_names(contract['protected_modules'])} may be imported by {who} only."


def _door(contract: dict[str, Any]) -> Iterator[str]:
    yield (
        f"An app in `{contract['package']}` may import only {_names(contract['door'])} of another. "
        f"Open to all: {_names(contract['open_apps'])}."
    )


def _acyclic(contract: dict[str, Any]) -> Iterator[str]:
    yield f"No module or package in {_names(contract['ancestors'])} imports itself through others."


_KINDS = {
    "acyclic_siblings": _acyclic,
    "door": _door,
    "layers": _layers,
    "forbidden": _forbidden,
    "independence": _independence,
    "protected": _protected,
}


def _names(modules: list[str]) -> str:
    return ", ".join(f"`{module}`" for module in modules)


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, render, __doc__))
