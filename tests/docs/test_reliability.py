"""Each test that the page on reliability names is there."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import DOCS, ROOT

TEXT = (DOCS / "reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+|\*)`", TEXT)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_the_test_is_there(file: str, name: str) -> None:
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert name == "*" or f"def {name}(" in source


def test_every_guarantee_has_a_row() -> None:
    assert re.findall(r"^\| P(\d+) \|", TEXT, re.MULTILINE) == [str(n) for n in range(1, 27)]
