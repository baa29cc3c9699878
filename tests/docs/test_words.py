"""The pages are in plain technical English: no metaphor that a reader would have to learn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import name_of, pages

# word of ours that is gone -> what to write
PLAIN = {
    r"(door)?bells?|rang": "notification, notify",
    r"(command )?desks?": "command handler",
    r"patients?": "the adaptation on probation",
    r"minders?": "launch monitor",
    r"promises?|promised": "guarantee, invariant, check; declares",
    r"ow(e|es|ed|ing)": "pending report",
    r"books|bookkeeping": "parameter groups, records",
    r"(is|was|were) (not )?heard of|heard lately": "has (not) reported",
    r"came of|became of|comes of": "outcome, result",
    r"rude": "a server that answers with errors",
    r"strangers?": "unknown",
    r"at hand|holds its tongue": "plain words",
    r"silent for": "has not reported for",
}
WORDS = re.compile(rf"\b({'|'.join(PLAIN)})\b", re.IGNORECASE)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_a_page_uses_no_private_metaphor(page: Path) -> None:
    found = [match.group(0) for match in WORDS.finditer(page.read_text(encoding="utf-8"))]
    assert found == []
