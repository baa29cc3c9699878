"""``docs/architecture.md`` names the folders that there are, and the contracts in force."""

from __future__ import annotations

import re
import subprocess

from scripts import architecture_docs
from tests.docs.pages import DOCS, ROOT

TEXT = (DOCS / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("esper", "apps")  # shown by what is in them
FILES_OF_PYTHON = frozenset({"__init__.py", "py.typed"})


def test_the_folder_table_is_the_tree() -> None:
    section = TEXT.partition("\n## Folders\n")[2].partition("\n## ")[0]
    table = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert sorted(table) == sorted(_folders())


def test_the_contracts_are_those_in_force() -> None:
    assert architecture_docs.render() == TEXT, "run python -m scripts.architecture_docs"


def _folders() -> set[str]:
    """Each folder at the top; of the packages, each part. Only what git knows."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    parts = [path.split("/") for path in listed]
    visible = [p for p in parts if len(p) > 1 and not p[0].startswith(".")]
    top = {p[0] for p in visible if p[0] not in PACKAGES}
    inner = {"/".join(p[:2]) for p in visible if p[0] in PACKAGES and p[1] not in FILES_OF_PYTHON}
    return top | inner
