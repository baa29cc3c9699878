"""The table that people read is the table that the code runs."""

from __future__ import annotations

from pathlib import Path

from apps.adaptations.lifecycle import DEADLINES, NEXT
from esper.contracts import ADAPTATION_PASSED_THROUGH, AdaptationState

ARCHITECTURE = Path(__file__).parents[3] / "docs" / "architecture.md"


def row(state: AdaptationState) -> str:
    following = ", ".join(f"`{to}`" for to in AdaptationState if to in NEXT[state]) or "end"
    if state in ADAPTATION_PASSED_THROUGH:
        return f"| `{state}` | {following} | passed through |"
    deadline = DEADLINES.get(state)
    if deadline is None:
        return f"| `{state}` | {following} | – |"
    length = deadline.policy or f"{deadline.seconds} s"
    return f"| `{state}` | {following} | {length} → `{deadline.outcome}` |"


def test_the_documented_lifecycle_is_the_one_in_the_code() -> None:
    text = ARCHITECTURE.read_text()
    missing = [row(state) for state in AdaptationState if row(state) not in text]
    assert not missing
