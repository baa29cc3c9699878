"""One command writes the tables of docs/performance.md, and touches nothing else of it."""

from __future__ import annotations

import importlib
from datetime import UTC, datetime

import pytest

from benchmarks.all import BENCHMARKS, PAGE, replaced, section
from hosts.paths import ROOT

PAGE_TEXT = (ROOT / "docs" / PAGE).read_text()


@pytest.mark.parametrize("name", [benchmark.module for benchmark in BENCHMARKS])
def test_the_page_has_a_place_for_each_benchmark(name: str) -> None:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    text = section(["python", "-m", name], "a  b\n1  2 \n", "a machine", moment)
    page = replaced(PAGE_TEXT, name, text)
    assert text in page
    assert "2026-01-02 00:00 UTC on a machine." in text
    before, after = PAGE_TEXT.split(f"<!-- {name}: measured -->")
    assert page.startswith(before)
    assert page.endswith(after.split(f"<!-- {name}: end -->")[1])
    assert replaced(page, name, text) == page


def test_a_page_without_the_place_is_refused() -> None:
    with pytest.raises(ValueError, match="ingest: measured"):
        replaced("# Performance", "ingest", "text")


@pytest.mark.parametrize("quick", [True, False])
def test_each_benchmark_takes_the_arguments_that_it_is_given(quick: bool) -> None:
    for benchmark in BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{benchmark.module}")
        if hasattr(module, "_parse"):
            module._parse(benchmark.command(quick=quick)[3:])
