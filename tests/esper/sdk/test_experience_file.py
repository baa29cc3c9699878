"""Closed cases are kept between local runs where a file is named, and a bad file harms nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper.sdk.experience_file import VARIABLE, keep_case, keep_change, read_experience


def test_the_next_run_knows_the_cases_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "new" / "cases.json"))
    assert read_experience() == {}
    keep_case("proj_ia3", kept=True, reward=0.2)
    keep_case("proj_ia3", kept=False, reward=-0.1)
    keep_case("widen_hidden", kept=True, reward=math.nan)

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with esper.attach(model, optimizer, verbose=False, server="") as session:
        known = session._parts.local.memory.experience  # type: ignore[union-attr]
    assert (known["proj_ia3"].kept, known["proj_ia3"].rolled_back) == (1, 1)
    assert known["proj_ia3"].mean_reward == pytest.approx(0.05)
    assert math.isnan(known["widen_hidden"].mean_reward)


def test_a_case_that_earns_on_or_is_taken_out_is_the_same_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cases.json"))
    keep_case("widen_hidden", kept=True, reward=0.2)
    keep_case("widen_hidden", kept=True, reward=0.1)
    keep_change("widen_hidden", lost=False, difference=0.2)
    known = read_experience()["widen_hidden"]
    assert (known.kept, known.rolled_back) == (2, 0)
    assert known.mean_reward == pytest.approx(0.25)
    keep_change("widen_hidden", lost=True, difference=-0.5)
    known = read_experience()["widen_hidden"]
    assert (known.kept, known.rolled_back) == (1, 1)
    assert known.mean_reward == pytest.approx(0.0)


def test_without_a_name_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    keep_case("proj_ia3", kept=True, reward=0.2)
    assert read_experience() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', '{"a": {"kept": "x"}}', "\x00"])
def test_a_broken_file_is_no_file_and_is_replaced(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cases.json"
    path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))
    assert read_experience() == {}
    keep_case("proj_ia3", kept=True, reward=0.2)
    assert read_experience()["proj_ia3"].kept == 1


def test_a_place_that_cannot_be_written_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "cases.json"))
    keep_case("proj_ia3", kept=True, reward=0.2)
    assert read_experience() == {}
