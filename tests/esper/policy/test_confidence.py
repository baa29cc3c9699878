"""Confidence is a probability, and closed cases correct it."""

from __future__ import annotations

import math

import pytest

from esper.contracts import Experience
from esper.policy import posterior_confidence


def test_experience_moves_the_prior_and_wins_in_the_end() -> None:
    assert posterior_confidence(0.8, Experience()) == pytest.approx(0.8)
    assert posterior_confidence(0.8, Experience(kept=0, rolled_back=10)) == pytest.approx(0.4)
    assert posterior_confidence(0.8, Experience(kept=990, rolled_back=0)) > 0.99
    assert math.isnan(posterior_confidence(math.nan, Experience(kept=5)))
