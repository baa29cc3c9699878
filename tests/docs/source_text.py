"""Every text in the code, so that a page can be held to the messages that it quotes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.docs.pages import ROOT

FOLDERS = ("esper", "apps", "esper_web", "launcher", "hosts")
GAP = "…"  # in place of what an f-string fills in


@cache
def source_text() -> str:
    """All string literals of the code, one a line, and the shell scripts as they are."""
    files = (file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))
    scripts = [(ROOT / "scripts" / "venv.sh").read_text()]
    return "\n".join([text for file in files for text in _literals(file)] + scripts)


def is_in_the_code(message: str) -> bool:
    """True where the parts of the message, split at ``…``, follow each other in one text."""
    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
    return re.search(".*?".join(parts), source_text()) is not None


def _literals(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values
            )
