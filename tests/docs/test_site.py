"""The site is built without a warning, and its pages load nothing from another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

# What a browser fetches by itself; an <a href> is only followed by a person.
FETCHED = re.compile(r"<(?:script|img|link|iframe)[^>]+?(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)")
# Material's own script loads the drawing library from there when a page has a mermaid block.
NEEDS_THE_NETWORK = re.compile(r'class="mermaid"|<pre class=mermaid')


@pytest.fixture(scope="module")
def site() -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return ROOT / "build" / "site"


@pytest.mark.timeout(900)
def test_a_page_fetches_nothing_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert FETCHED.findall(text) == [], page.name
        assert not NEEDS_THE_NETWORK.search(text), page.name


@pytest.mark.timeout(900)
def test_a_style_fetches_nothing_from_another_host(site: Path) -> None:
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", text), style.name


@pytest.mark.timeout(900)
def test_the_reference_shows_what_a_script_calls(site: Path) -> None:
    text = (site / "reference" / "python" / "session.html").read_text(encoding="utf-8")
    for name in ("attach", "step", "graft", "undo", "state_dict", "RunStopped"):
        assert f">{name}</" in text
