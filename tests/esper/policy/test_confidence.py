"""Confidence is a probability that comes from cases, and says so where they tell nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.confidence_fit import cross_validated, fit
from esper.contracts import Experience
from esper.policy.calibration import calibration
from esper.policy.cases import Case, shipped
from esper.policy.confidence import (
    ConfidenceModel,
    Subject,
    corrected,
    shipped_models,
)

RATES = {"good": 0.9, "fair": 0.5, "bad": 0.1}


def drawn(rates: dict[str, float], cases: int = 240) -> list[Case]:
    """Cases of ten trainings whose success depends on the choice alone."""
    rng = np.random.default_rng(3)
    names = sorted(rates)
    return [
        Case(
            seed=place % 10,
            host="drawn",
            kind="graft",
            choice=(slug := names[int(rng.integers(len(names)))]),
            layer="Linear",
            finding="",
            gain=math.nan,
            error=math.nan,
            success=bool(rng.random() < rates[slug]),
            measured={"added": float(rng.normal())},
        )
        for place in range(cases)
    ]


def values(model: ConfidenceModel, choices: Sequence[str]) -> list[float]:
    return [model.confidence(Subject(slug, "Linear", "")).value for slug in choices]


def test_where_cases_tell_nothing_the_answer_is_the_base_rate() -> None:
    cases = drawn(dict.fromkeys(RATES, 0.6))
    model = fit(cases)

    for value in values(model, [*RATES, "never seen"]):
        assert value == pytest.approx(model.base, abs=0.08)
    wide = model.confidence(Subject("good", "Linear", "", {"added": 3.0}))
    assert wide.low < model.base < wide.high


def test_where_the_kind_tells_the_answer_follows_it_and_small_groups_less() -> None:
    model = fit(drawn(RATES))
    good, fair, bad, new = values(model, [*RATES, "never seen"])

    assert good > 0.8
    assert bad < 0.2
    assert bad < fair < good
    assert bad < new < good

    few = fit(
        [case for case in drawn(RATES) if case.choice != "bad"] + drawn(RATES | {"bad": 0})[:6]
    )
    assert values(few, ["bad"])[0] > bad


def test_what_it_says_of_other_trainings_is_calibrated() -> None:
    held_out = cross_validated(drawn(RATES, 600))
    found = calibration(held_out.said, held_out.came_true)

    assert found.cases == 600
    assert found.ece < 0.05
    assert found.brier < found.base - 0.05
    assert held_out.inside[0] >= 8


def test_the_weights_add_up_to_the_confidence() -> None:
    known = shipped()[0]
    for own in ({}, {known.choice: Experience(1, 7), "new": Experience(4, 0)}):
        for subject in (
            Subject(known.choice, known.layer, known.finding, known.measured),
            Subject("new", "Linear", ""),
        ):
            found = shipped_models()["graft"].confidence(subject, own)
            assert sum(term.weight for term in found.terms) == pytest.approx(found.value, abs=1e-9)
            assert 0 < found.low < found.value < found.high < 1
    given = corrected(0.8, Experience(0, 10))
    assert sum(term.weight for term in given.terms) == pytest.approx(given.value)


def test_own_cases_move_their_kind_most_and_win_in_the_end() -> None:
    model = fit(drawn(RATES))
    subject, other = Subject("good", "Linear", ""), Subject("bad", "Linear", "")
    seen = {"good": Experience(kept=0, rolled_back=10)}

    fall = model.confidence(subject).value - model.confidence(subject, seen).value
    assert fall > 0.1
    assert model.confidence(other, seen).value <= model.confidence(other).value
    many = {"good": Experience(kept=4, rolled_back=396)}
    assert model.confidence(subject, many).value < 0.1
    assert model.confidence(subject, many).cases > 400


def test_few_cases_of_a_kind_are_too_few_to_trust() -> None:
    model = replace(shipped_models()["graft"], cases={"rare": 19})

    found = model.confidence(Subject("rare", "Linear", ""))
    assert not found.trusted
    assert "from 19 cases of this kind, too few to trust, 20 are needed" in found.about
    assert model.confidence(Subject("rare", "Linear", ""), {"rare": Experience(1)}).trusted


def test_a_callers_own_confidence_is_corrected_by_closed_cases() -> None:
    assert corrected(0.8, Experience()).value == pytest.approx(0.8)
    assert corrected(0.8, Experience(kept=0, rolled_back=10)).value == pytest.approx(0.4)
    assert corrected(0.8, Experience(kept=990, rolled_back=0)).value > 0.99


def test_the_shipped_model_is_fitted_on_the_shipped_table() -> None:
    for kind, model in shipped_models().items():
        own = [case for case in shipped() if case.kind == kind]
        assert model.successes == (sum(case.success for case in own), len(own))
        assert sum(model.cases.values()) == len(own)
        said = [
            model.confidence(Subject(c.choice, c.layer, c.finding, c.measured)).value for c in own
        ]
        assert float(np.mean(said)) == pytest.approx(model.base, abs=0.04)


def test_cases_of_an_answer_to_a_finding_count_for_that_answer() -> None:
    dice = np.random.default_rng(0)
    plain = {"gain": math.nan, "error": math.nan, "layer": "Linear", "kind": "graft", "host": "h"}
    cases = [
        Case(seed=number, choice=choice, finding=finding, success=bool(dice.random() < rate),
             **plain)  # type: ignore[arg-type]
        for number in range(80)
        for choice, finding, rate in (
            ("wider", "capacity", 0.95), ("wider", "", 0.3),
            ("other", "capacity", 0.2), ("other", "", 0.3),
        )
    ]  # fmt: skip
    model = fit(cases)
    said = {
        (choice, finding): model.confidence(Subject(choice, "Linear", finding)).value
        for choice in ("wider", "other")
        for finding in ("capacity", "")
    }
    assert said["wider", "capacity"] > 0.85
    assert said["other", "capacity"] < 0.35
    assert said["wider", ""] < 0.45
    terms = model.confidence(Subject("wider", "Linear", "capacity")).terms
    assert any(term.text == "cases of wider to capacity" for term in terms)
