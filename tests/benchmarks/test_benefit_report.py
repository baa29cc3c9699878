"""The report on benefit says "pays" only where a gain that matters is shown."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.benefit import report
from benchmarks.benefit.hosts import NARROW, rows_of
from benchmarks.benefit.idle import Idle
from benchmarks.benefit.narrow import Record
from benchmarks.benefit.statistics import NOT, PAYS, UNKNOWN, Comparison, compare, holm, worst


def gains(mean: float, spread: float, runs: int) -> dict[str, list[float]]:
    drawn = np.random.default_rng(0).normal(mean, spread, runs) if runs else np.array([])
    return {"one host": list(drawn[::2]), "another": list(drawn[1::2])}


@pytest.mark.parametrize(
    ("mean", "spread", "runs", "word"),
    [
        (0.1, 0.02, 12, PAYS),
        (-0.1, 0.02, 12, NOT),
        (0.001, 0.0005, 12, NOT),  # a gain that does not matter
        (0.01, 0.2, 12, UNKNOWN),
        (0.1, 0.0, 6, UNKNOWN),  # too few runs
        (0.0, 0.0, 0, UNKNOWN),
    ],
    ids=["gain", "loss", "tiny gain", "noise", "few", "none"],
)
def test_the_word_follows_what_is_shown(mean: float, spread: float, runs: int, word: str) -> None:
    assert compare("arm", gains(mean, spread, runs)).word == word


def test_an_arm_that_could_not_be_run_leaves_the_others() -> None:
    found = compare("arm", {"one host": [0.1, math.nan], "another": [math.nan] * 2})
    assert (found.runs, found.word) == (1, UNKNOWN)


def test_many_comparisons_need_more_evidence() -> None:
    one = compare("arm", gains(0.05, 0.06, 10))
    assert one.word == PAYS
    among = holm([one, *(Comparison("other", 0.0, -1, 1, 0.5, 0.9, 10) for _ in range(9))])
    assert among[0].word == UNKNOWN
    assert [found.chance for found in among[1:]] == [1.0] * 9


def test_the_headline_is_the_worst_word() -> None:
    assert worst([PAYS, UNKNOWN]) == UNKNOWN
    assert worst([PAYS, NOT, UNKNOWN]) == NOT
    assert worst([PAYS, PAYS]) == PAYS


def record(seed: int, own: float, left: float) -> Record:
    """Esper is better than a run left alone, and worse than a larger net at equal cost."""
    losses = {"Esper": own, "left alone": left, "rate alone": left, "clock, random": left}
    larger = {f"larger net, equal {cost}": own for cost in ("steps", "FLOPs")}
    larger["larger net, equal CPU time"] = own / 2
    every = losses | larger
    return Record("digits", seed, True, 2_500, sunk=every, scratch=every, grafts=["widen_hidden"])


def test_a_negative_result_is_in_the_report() -> None:
    records = [record(seed, 0.1 + seed / 1_000, 0.2) for seed in range(10)]
    idle = [Idle("a model", 0.4, [1.2] * 10), Idle("a larger one", 20.0, [1.001] * 10)]
    worse = record(10, 0.3, 0.2)
    worse.remedies = ["set_lr at step 820, did not help, because saturation is still open"]
    text = report.document([*records, worse], [], idle, [True], ["Commit abc."])
    assert "| digits, seed 10 | -50.0% | set_lr at step 820 | widen_hidden |" in text
    assert "| sunk run: better than left alone in 90 % of runs | yes | 91% |" in text
    assert "| idle costs at most 1 %, a model | **no** | +20.0% |" in text
    assert "| idle costs at most 1 %, a larger one | yes | +0.1% |" in text
    assert "## Sunk run: does not pay at equal cost" in text
    assert "| another layer | - | - to - | - | 0 | 1.000 | **cannot tell** |" in text


def test_tracks_that_were_not_run_again_are_kept_with_their_commit() -> None:
    idle = [Idle("a model", 0.4, [1.2] * 10)]
    wide = [record(seed, 0.1, 0.2) for seed in range(8)]
    for one in wide:
        one.narrow = False
    told = ["Commit old, idle,wide, seeds 0:8, 3 minutes.", "Commit other, narrow, seeds 0:8."]
    first = report.document(wide, [], idle, [True], told)
    narrow = [record(seed, 0.1, 0.2) for seed in range(8)]
    page = report.document(narrow, [], [], [], ["Commit new, narrow, seeds 0:8."], first)
    for _ in range(2):
        note = "Not run again with the rest of this page. Commit old, idle,wide, seeds 0:8"
        for title in ("## From scratch, wide enough", "## Idle"):
            (section,) = (one for one in page.split("\n## ") if title[3:] in one.split("\n")[0])
            assert note in section
            assert "other" not in section
            assert "a model" in section or "left alone" in section
        assert page.count("## Sunk run") == 1
        page = report.document(narrow, [], [], [], ["Commit newer, narrow, seeds 0:8."], page)
    assert page.count(note) == 2
    again = report.document(wide, [], idle, [True], ["Commit all, idle,wide, seeds 0:8."], page)
    assert again.count("## Idle") == again.count("## From scratch, wide enough") == 1
    assert "Commit old" not in again


def test_no_row_is_reported_that_was_learned() -> None:
    for host in NARROW:
        rows = rows_of(host, 100, 10)
        sizes = [len(part[0]) for part in (rows.train, rows.judge, rows.report)]
        assert sum(sizes) == len(host.data()[0])
        assert int(rows.drawn.max()) < sizes[0]
