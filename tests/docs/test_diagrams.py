"""Each drawing is of the text beside it."""

from __future__ import annotations

from scripts.diagram_docs import FOLDER, stale


def test_every_diagram_is_drawn_from_its_text() -> None:
    assert list(FOLDER.glob("*.mmd"))
    assert stale(FOLDER) == [], "run python -m scripts.diagram_docs"
