"""The catalogue's page is what the catalogue says."""

from __future__ import annotations

from esper import blueprints
from scripts.blueprint_docs import TARGET, render


def test_the_page_is_what_the_generator_writes() -> None:
    text = TARGET.read_text(encoding="utf-8")
    assert all(f"### {blueprint.slug}\n" in text for blueprint in blueprints.list_blueprints())
    assert text == render(), "run python -m scripts.blueprint_docs"
