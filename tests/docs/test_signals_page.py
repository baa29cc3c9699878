"""The page of the signals has each signal, with its note."""

from __future__ import annotations

from pathlib import Path

from esper.contracts import SIGNAL_NOTES

PAGE = Path(__file__).parents[2] / "docs/explanation/signals.md"


def test_the_page_lists_each_signal_as_the_contract_describes_it() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    expected = [
        f"| `{signal}` | {unit} | {note} |".replace("|h|", r"\|h\|").replace("|mean|", r"\|mean\|")
        for signal, (unit, note) in SIGNAL_NOTES.items()
    ]

    assert rows == expected
