"""The table of docs/how-to/saving.md names the test of each of its rows."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_row_names_a_test_that_exists() -> None:
    text = (ROOT / "docs/how-to/saving.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    files = {path.stem: path for path in (ROOT / "tests/esper").rglob("test_*.py")}
    assert len(rows) > 20

    for row in rows:
        named = re.search(r"\| `(\w+)::(\w+)` \|$", row)
        assert named is not None, row
        assert f"def test_{named[2]}(" in files[f"test_{named[1]}"].read_text(), row
