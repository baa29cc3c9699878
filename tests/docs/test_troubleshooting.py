"""Every message of the troubleshooting page is one that the code can say."""

from __future__ import annotations

import re

import pytest

from esper.contracts import AdaptationState
from tests.docs.pages import DOCS
from tests.docs.source_text import is_in_the_code

TEXT = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
FIRST_COLUMN = re.findall(r"^\| `([^`]+)` \|", TEXT, re.MULTILINE)
MESSAGES = [cell for cell in FIRST_COLUMN if cell not in set(AdaptationState)]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_in_the_code(message: str) -> None:
    assert is_in_the_code(message), f"no text in the code holds {message!r}"


def test_the_page_has_messages_at_all() -> None:
    assert len(MESSAGES) > 20
