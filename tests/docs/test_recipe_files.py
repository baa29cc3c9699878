"""The recipe files of the pages are files that a host takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.recipes.files import read_recipe
from tests.docs.pages import DOCS, blocks, name_of

PAGES = (DOCS / "recipes.md", DOCS / "how-to" / "recipe.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_recipe_of_a_page_can_be_used(page: Path, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "recipes").mkdir()
    [block] = blocks(page, "toml")
    file = tmp_path / "recipes" / "mine.toml"
    file.write_text(block.code, encoding="utf-8")
    file.chmod(0o644)
    recipe = read_recipe(file)
    assert recipe.slug == "mine"
    assert recipe.resume_argv
