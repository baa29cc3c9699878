"""Confidence against what came true."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper.policy.calibration import calibration, overconfidence, shrunken_rate


def test_honest_confidence_has_a_small_error_and_beats_the_base_rate() -> None:
    rng = np.random.default_rng(0)
    said = rng.uniform(0.0, 1.0, 2_000)
    found = calibration(said.tolist(), (rng.uniform(size=2_000) < said).tolist())

    assert found.ece < 0.05
    assert found.brier < found.base
    assert sum(entry.cases for entry in found.bins) == 2_000


def test_confidence_that_boasts_is_told_so() -> None:
    found = calibration([0.9] * 100, [True] * 50 + [False] * 50)

    assert found.ece == pytest.approx(0.4)
    assert found.brier == pytest.approx(0.41)
    assert found.base == pytest.approx(0.25)
    assert "Brier score 0.410 (base rate 0.250)" in str(found)


def test_few_cases_are_too_few_to_trust() -> None:
    found = calibration([0.9] * 19 + [math.nan], [True] * 20)

    assert not found.trusted
    assert "too few to trust: 19 closed cases, 20 are needed" in str(found)
    assert calibration([], []).cases == 0


def test_a_small_group_says_what_the_wider_group_says() -> None:
    wide = (700, 1_000)

    assert shrunken_rate([wide, (0, 1)]) == pytest.approx(0.62, abs=0.01)
    assert shrunken_rate([wide, (0, 200)]) < 0.05
    assert shrunken_rate([]) == 0.5


def test_confidence_that_was_too_high_of_late_is_told_and_chance_is_not() -> None:
    rng = np.random.default_rng(1)
    said = rng.uniform(0.6, 0.9, 300)
    honest = rng.uniform(size=300) < said
    drifted = np.concatenate([honest[:200], rng.uniform(size=100) < said[200:] - 0.3])

    assert overconfidence(said.tolist(), honest.tolist()) == 0.0
    assert overconfidence(said.tolist(), drifted.tolist()) == pytest.approx(0.3, abs=0.1)
    assert overconfidence([0.9] * 19, [False] * 19) == 0.0
    assert overconfidence([0.5] * 50, [True] * 50) == 0.0
