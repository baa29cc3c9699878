"""The benchmark of ordinary runs counts what happened to each, and draws the same run again."""

from __future__ import annotations

import math

import pytest

from benchmarks.ordinary import Pair, draw, run, table, wilson


def pair(alone: float, watched: float, *, equal: bool = False, acts: int = 1) -> Pair:
    return Pair(7, "a run", alone, watched, equal, ["rewind at 3 for loss_spike"] * acts)


@pytest.mark.parametrize(
    ("entry", "verdict"),
    [
        (pair(0.9, 0.9, equal=True, acts=0), "untouched"),
        (pair(0.9, 0.89), "as good"),
        (pair(0.9, 0.9, equal=True), "as good"),
        (pair(0.9, 0.9, acts=0), "as good"),
        (pair(0.9, 0.87), "worse"),
        (pair(0.9, 0.93), "better"),
        (pair(math.nan, 0.1), "better"),
        (pair(0.1, math.nan), "worse"),
        (pair(math.nan, math.nan), "as good"),
    ],
)
def test_a_verdict_is_of_the_held_out_score(entry: Pair, verdict: str) -> None:
    assert entry.verdict == verdict


def test_the_table_counts_all_runs_and_names_those_that_were_touched() -> None:
    pairs = [pair(0.9, 0.9, equal=True, acts=0), pair(0.9, 0.5)]
    text = table(pairs, range(7, 9))
    assert "2 runs of 400 steps, seeds 7:9" in text
    assert "worse: seed 7, a run: 0.900 → 0.500; rewind at 3 for loss_spike" in text
    assert text.count("seed 7,") == 1


def test_an_interval_holds_its_share_also_where_nothing_was_seen() -> None:
    low, high = wilson(0, 200)
    assert low == 0.0
    assert 0.01 < high < 0.03
    low, high = wilson(5, 10)
    assert low < 0.5 < high


def test_a_seed_draws_the_same_run_again() -> None:
    assert draw(1).name == draw(1).name
    assert len({draw(seed).name for seed in range(20)}) == 20
    assert str(run(1, watched=False)) == str(run(1, watched=False))
