"""The glossary has at most 25 words, each in one plain sentence, and each is used."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import DOCS, pages

GLOSSARY = DOCS / "glossary.md"
ENTRIES: list[tuple[str, str]] = re.findall(
    r"^([^\n#:]+)\n:   ([^\n]+)$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE
)
ELSEWHERE = "\n".join(
    page.read_text(encoding="utf-8") for page in pages() if page != GLOSSARY
).lower()


def test_there_are_at_most_25_words() -> None:
    words = [word for word, _ in ENTRIES]
    assert 15 <= len(words) <= 25
    assert len(set(words)) == len(words)
    assert len(words) == GLOSSARY.read_text(encoding="utf-8").count("\n:   ")


@pytest.mark.parametrize(("word", "meaning"), ENTRIES)
def test_a_word_is_one_sentence_and_is_used(word: str, meaning: str) -> None:
    assert meaning.endswith(".")
    assert not re.search(r"[.!?] [A-Z]", meaning), f"{word}: more than one sentence"
    assert re.search(rf"\b{re.escape(word.lower())}", ELSEWHERE), f"no page uses {word!r}"
