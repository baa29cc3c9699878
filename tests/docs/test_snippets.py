"""The Python of each page runs from top to bottom, and prints what the page says."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.blueprints import registry
from tests.docs.pages import README, blocks, name_of, pages

# The README's blocks are fragments; test_readme_snippets.py gives them a model.
PAGES = [page for page in pages() if page != README and blocks(page, "python")]


@pytest.fixture(autouse=True)
def _an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for variable in ("ESPER_SERVER", "ESPER_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(registry, "_registered", {})
    registry._by_slug.cache_clear()
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    registry._by_slug.cache_clear()


@pytest.mark.filterwarnings("ignore")  # those of Lightning, transformers and Accelerate
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_runs_as_it_is_printed(page: Path) -> None:
    torch.manual_seed(0)
    world: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        if block.skip is not None:
            continue
        if block.title is not None:
            Path(block.title).write_text(block.code, encoding="utf-8")
            continue
        where = f"{name_of(page)}:{block.line}"
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + block.code, where, "exec"), world)
        if block.output is not None:
            _expect(block.output, printed.getvalue(), where)


def _expect(wanted: str, got: str, where: str) -> None:
    same = doctest.OutputChecker().check_output(wanted, got, doctest.ELLIPSIS)
    assert same, f"{where} prints\n{got}\nand the page says\n{wanted}"
