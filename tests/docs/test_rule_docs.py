"""The page of findings is what the rules say."""

from __future__ import annotations

from esper.diagnosis import list_rules
from scripts.rule_docs import TARGET, render


def test_the_page_is_what_the_generator_writes() -> None:
    text = TARGET.read_text(encoding="utf-8")
    assert all(f"## {rule.slug}\n" in text for rule in list_rules())
    assert text == render(), "run python -m scripts.rule_docs"
