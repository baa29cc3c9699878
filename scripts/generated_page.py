"""What the generators of documents share: write a page, or compare it with ``--check``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def write_or_check(target: Path, render: Callable[[], str], description: str | None) -> int:
    """The exit status: 1 where ``--check`` was given and the file differs.

    Args:
        render: the whole text of the file.
        description: the generator's docstring, whose first line is shown by ``--help``.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    text = render()
    if check:
        return int(text != target.read_text(encoding="utf-8"))
    target.write_text(text, encoding="utf-8")
    return 0
