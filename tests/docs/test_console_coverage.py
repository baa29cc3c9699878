"""Each row of docs/console-coverage.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from hosts.paths import ROOT


def test_every_test_that_the_table_names_exists() -> None:
    text = (ROOT / "docs/console-coverage.md").read_text()
    named = re.findall(r"`(\w[\w/]*\.py)(?:::(\w+))?`", text)
    assert len(named) > 60
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not _defines(ROOT / "tests" / path.removeprefix("tests/"), name)
    ]
    assert missing == []


def _defines(file: Path, name: str) -> bool:
    return file.exists() and (not name or re.search(rf"def {name}\b", file.read_text()) is not None)
