"""A start knows the catalogues without torch, and never from a file that is out of date."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.blueprints import offered as module
from apps.blueprints.models import Blueprint, KnownRemedy
from apps.blueprints.offered import (
    SOURCES,
    WRITTEN,
    Offered,
    digests_of_sources,
    offered,
    offered_by_code,
)
from apps.blueprints.services import sync_catalogue

FOLDERS = ("blueprints/catalog", "blueprints/compositions", "remedies/catalog")
BY_CODE = Offered({"of the code": {}}, {})


def test_what_is_written_down_is_what_the_code_offers() -> None:
    written = json.loads(WRITTEN.read_text(encoding="utf-8"))
    again = "run: python -m scripts.offered_rows"
    assert Offered(written["blueprints"], written["remedies"]) == offered_by_code(), again
    assert written["sources"] == digests_of_sources(), again


@pytest.mark.django_db
def test_both_tables_are_filled_without_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = offered_by_code()
    monkeypatch.delattr(module, "offered_by_code")
    changed = sync_catalogue()
    assert set(changed) == {*rows.blueprints, *rows.remedies}
    assert {row.slug for row in Blueprint.objects.filter(present=True)} == set(rows.blueprints)
    assert {row.slug for row in KnownRemedy.objects.filter(present=True)} == set(rows.remedies)
    assert sync_catalogue() == []


def append(folder: Path) -> None:
    with sorted(folder.glob("[a-z]*"))[0].open("a") as file:
        file.write(" ")


def add(folder: Path) -> None:
    first = sorted(folder.glob("[a-z]*"))[0]
    shutil.copy(first, first.with_stem("one_more"))


def remove(folder: Path) -> None:
    sorted(folder.glob("[a-z]*"))[0].unlink()


@pytest.mark.parametrize("change", [append, add, remove])
@pytest.mark.parametrize("folder", FOLDERS)
def test_another_catalogue_than_that_is_asked_for_itself(
    folder: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FOLDERS:
        shutil.copytree(SOURCES / name, tmp_path / name, ignore=shutil.ignore_patterns("__pyc*"))
    monkeypatch.setattr(module, "SOURCES", tmp_path)
    monkeypatch.setattr(module, "offered_by_code", lambda: BY_CODE)
    assert offered() != BY_CODE
    change(tmp_path / folder)
    assert offered() == BY_CODE


def test_compositions_of_a_user_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "offered_by_code", lambda: BY_CODE)
    monkeypatch.setenv("ESPER_COMPOSITIONS", str(tmp_path))
    assert offered() == BY_CODE
