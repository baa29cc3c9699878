"""The pages of the documentation, and what they show: blocks of code and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
SECURITY = ROOT / "SECURITY.md"
# Not ours to change: the proposal that Esper started from.
PROPOSAL = DOCS / "seed-integration-layer.md"
_BLOCK = re.compile(
    r"(?:<!-- test: skip, (?P<skip>[^>]+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^ *```$"
    r"(?:\n+^ *```text\n(?P<output>.*?)^ *```$)?",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        output: the block of text right after it: what it prints.
        skip: why no test runs it.
        title: the file that the reader puts it into.
    """

    language: str
    code: str
    line: int
    output: str | None = None
    skip: str | None = None
    title: str | None = None


def pages() -> list[Path]:
    """Every page that we write, those at the top of the tree too."""
    return [
        README,
        CONTRIBUTING,
        SECURITY,
        *(p for p in sorted(DOCS.rglob("*.md")) if p != PROPOSAL),
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            language,
            dedent(found["code"]),
            text.count("\n", 0, found.start("code")) + 1,
            found["output"] and dedent(found["output"]),
            found["skip"],
            found["title"],
        )
        for found in _BLOCK.finditer(text)
        if found["language"] == language
    ]


def commands(page: Path) -> Iterator[list[str]]:
    """Each command of the page's shell blocks, as its words; comments are left out."""
    for block in blocks(page, "sh"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and block.skip is None:
                yield words
