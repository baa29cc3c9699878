"""The page of remedies is what the catalogue says."""

from __future__ import annotations

from esper.remedies import list_remedies
from scripts.remedy_docs import TARGET, render


def test_the_page_is_what_the_generator_writes() -> None:
    text = TARGET.read_text(encoding="utf-8")
    assert all(f"## {remedy.slug}\n" in text for remedy in list_remedies())
    assert text == render(), "run python -m scripts.remedy_docs"
