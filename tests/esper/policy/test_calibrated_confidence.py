"""Confidence is a probability and is scored as one."""

from __future__ import annotations

import math

import pytest

from esper.contracts import Experience
from esper.policy import brier_score, calibration, posterior_confidence


def test_brier_score_is_the_mean_squared_miss() -> None:
    assert brier_score([1.0, 0.5, 0.0], [True, True, True]) == pytest.approx((0 + 0.25 + 1) / 3)


def test_unknown_confidence_is_no_case() -> None:
    found = calibration([math.nan, 0.8], [True, True])

    assert found.cases == 1
    assert found.brier == pytest.approx(0.04)


def test_bins_hold_every_case_once_and_one_belongs_to_the_last() -> None:
    found = calibration([0.0, 0.05, 0.95, 1.0], [False, True, True, True])

    assert [b.cases for b in found.bins] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert found.bins[0].kept_share == pytest.approx(0.5)
    assert found.bins[-1].mean_confidence == pytest.approx(0.975)
    assert math.isnan(found.bins[4].kept_share)


def test_below_twenty_cases_nobody_trusts_it() -> None:
    assert calibration([0.5] * 19, [True] * 19).note == "too few to trust"
    assert calibration([0.5] * 20, [True] * 20).trusted


def test_experience_moves_the_prior_and_wins_in_the_end() -> None:
    assert posterior_confidence(0.8, Experience()) == pytest.approx(0.8)
    assert posterior_confidence(0.8, Experience(kept=0, rolled_back=10)) == pytest.approx(0.4)
    assert posterior_confidence(0.8, Experience(kept=990, rolled_back=0)) > 0.99
    assert math.isnan(posterior_confidence(math.nan, Experience(kept=5)))
