"""The report of Rescue-400 counts what the arms did, and names what was lost."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.rescue import report
from benchmarks.rescue.measures import (
    NOT_LEARNED,
    Detection,
    Record,
    Recovery,
    alarms_in_10_000,
    share,
)
from benchmarks.rescue.training import Outcome

TWIN = 0.9


def outcome(*scores: float, found: dict[str, int] | None = None) -> Outcome:
    """A run that was scored each 25 steps, of which the last three count."""
    return Outcome(
        found=found or {},
        severe=dict.fromkeys(found or {}, "serious"),
        scores=[(25 * (place + 1), score) for place, score in enumerate(scores)],
        steps=25 * len(scores),
        cpu_s=1.0,
    )


def record(automatic: Outcome, *, found: dict[str, int], seed: int = 100) -> Record:
    alone = outcome(0.5, 0.5, 0.5, found=found)
    arms = {"observe": alone, "nothing": alone, "automatic": automatic, "random": alone}
    return Record(
        tier="AT-8", kind="dying ReLU", name="digits", seed=seed, steps=100,
        rules=["dying_relu"], labels=[], bug=False, begins=1, twin=TWIN, twin_cpu_s=1.0,
        hurts=True, clean_steps=100, arms=arms, counts=True,
    )  # fmt: skip


REPAIRED = record(outcome(0.5, 0.89, 0.9, 0.88), found={"dying_relu": 20})
LOST = record(outcome(0.4, 0.4, 0.4, 0.4), found={"plateau": 60, "dying_relu": 80}, seed=101)
BROKEN = record(outcome(0.9, 0.9, 0.9, math.nan), found={}, seed=102)


@pytest.mark.parametrize(
    ("found", "repaired", "worse", "ratio"),
    [(REPAIRED, True, False, 0.5), (LOST, False, True, None), (BROKEN, False, True, None)],
    ids=["repaired", "worse", "not a number"],
)
def test_a_run_is_repaired_or_worse(
    found: Record, repaired: bool, worse: bool, ratio: float | None
) -> None:
    assert found.repaired("automatic") is repaired
    assert found.worse("automatic") is worse
    got = found.step_ratio("automatic")
    assert got == ratio if ratio is not None else math.isnan(got)


def test_what_was_told_and_named_is_counted() -> None:
    got = Detection.of([REPAIRED, LOST, BROKEN])
    assert (got.told.value, got.named.value) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert got.top1.value == pytest.approx(1 / 3)  # in LOST, the plateau came first
    assert got.precision == pytest.approx(2 / 3)
    assert got.steps == 40
    recovery = Recovery.of([REPAIRED, LOST, BROKEN], "automatic")
    assert (recovery.repaired.value, recovery.worse) == (pytest.approx(1 / 3), 2)


def test_an_interval_holds_the_mean_and_shrinks_with_more_cases() -> None:
    few, many = share([0.0, 1.0] * 5), share([0.0, 1.0] * 500)
    for got in (few, many):
        assert got.low <= got.value <= got.high
    assert many.high - many.low < few.high - few.low
    assert str(share([])) == "-"


def test_a_finding_in_a_healthy_run_is_a_false_alarm() -> None:
    alarmed = record(outcome(0.9, 0.9, 0.9), found={})
    alarmed.alarms = {"plateau": 30}
    assert alarms_in_10_000([alarmed, REPAIRED]) == (1, 200)
    text = "\n".join(report.document([alarmed, REPAIRED], "about"))
    assert "plateau at 30" in text


def test_the_page_says_what_was_missed(tmp_path: Path) -> None:
    saved = json.loads(json.dumps([asdict(found) for found in (REPAIRED, LOST, BROKEN)]))
    report.write([Record.from_json(entry) for entry in saved], "Commit x.", tmp_path)
    page = (tmp_path / "rescue.md").read_text()
    assert "| AT-8 repaired in flight: 95 % | **no** | 33% (0% to 100%) |" in page
    lost = "- dying ReLU, digits, seed 101: 0.400 (worse), twin 0.900, left alone 0.500; no remedy"
    assert lost in page
    assert page.count("(images/rescue-") == 2
    assert len(list((tmp_path / "images").glob("*.svg"))) == 2


def test_a_record_says_which_tiers_seeds_and_arms_it_is_of() -> None:
    text = report.origin("commit x.", [REPAIRED, LOST])
    assert text.startswith("- AT-8: commit x. The time was enough for seeds 100, 101 and the arms ")
    run, _, missing = text.partition(" Not run: ")
    assert run.endswith("nothing, random, automatic.")
    assert missing == "healthy, plateau, zclip, restart, oracle, supervised."
    silent = Record.from_json(asdict(REPAIRED) | {"tier": "Silent-12"})
    assert report.origin("commit x.", [silent]) == "- Silent-12: commit x."


def test_a_later_file_replaces_the_arms_that_it_has() -> None:
    """So that the arms without Esper need not be run again with each of its states."""
    newer = replace(LOST, arms={"automatic": outcome(0.9, 0.9, 0.9)})
    parts = [[REPAIRED, LOST], [newer]]
    joined = report.join(parts)
    assert [r.title for r in joined] == [REPAIRED.title, LOST.title]
    assert joined[1].arms == LOST.arms | newer.arms
    assert joined[1].repaired("automatic")
    older, later = report.origins(["commit x.", "commit y."], [[LOST], [newer]]).splitlines()
    assert "commit x" in older
    assert "arms nothing, random." in older
    assert "commit y" in later
    assert "arms automatic." in later


def test_what_is_found_in_a_twin_that_did_not_learn_is_counted_and_told_apart() -> None:
    learned, unlearned = replace(REPAIRED, alarms={"plateau": 30}), replace(LOST, counts=False)
    unlearned = replace(unlearned, why_not=NOT_LEARNED, twin=0.4, alarms={"dying_relu": 5})
    text = "\n".join(report.document([learned, unlearned], "about"))
    assert "| **no** | 2 in 200 steps, 1 of them in runs that learned |" in text
    assert "seed 101, did not learn: 0.40; dying_relu at 5" in text
    assert "seed 100; plateau at 30" in text
