"""Every file that a page names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import CONTRIBUTING, DOCS, README, ROOT, name_of, pages

TOP = "|".join(
    sorted(re.escape(entry.name) for entry in ROOT.iterdir() if not entry.name.startswith("."))
)
# `folder/file.py` in a code span; what holds a placeholder or a pattern is no path.
NAMED = re.compile(rf"`((?:{TOP})/[\w./-]+)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
MODULE = re.compile(r"python -m ((?:scripts|tests|benchmarks|esper|launcher)[\w.]*)")
# Made by the reader, or by a running Esper.
MADE = frozenset(
    {"docker/.env", "docker/secrets/", "docker/secrets/tamiyo_token", "docker/certificates/"}
)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = set(NAMED.findall(page.read_text(encoding="utf-8"))) - MADE
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_module_that_a_page_runs_exists(page: Path) -> None:
    for module in MODULE.findall(page.read_text(encoding="utf-8")):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), module


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [
        str(page.relative_to(DOCS))
        for page in DOCS.rglob("*.md")
        if str(page.relative_to(DOCS)) not in text
    ]
    assert missing == []
