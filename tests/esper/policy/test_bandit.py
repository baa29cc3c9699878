"""The bandit learns from what it tried, says how likely each choice was, and keeps its limit."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.bandit import ALLOWED, kinds, measured, replayed
from esper.policy.bandit import NOTHING, LinearBandit


def test_its_regret_is_below_random_and_the_cheapest_and_not_above_greedy() -> None:
    for world, seeds, rounds in ((kinds, 12, 120), (replayed, 6, 100)):
        found = measured(world, seeds=seeds, rounds=rounds)
        mean, half = found["bandit"]
        for other in ("random", "cheapest first"):
            assert mean + half < found[other][0] - found[other][1], found
        assert mean - half < found["greedy"][0] + found["greedy"][1], found


def test_the_cautious_one_stays_near_doing_nothing_where_all_harms() -> None:
    rng, lowest = np.random.default_rng(0), {}
    for allowed in (ALLOWED, np.inf):
        learner, sums = LinearBandit.new(2, noise=0.5, allowed=float(allowed)), [0.0]
        for _ in range(60):
            arm = learner.choose(np.eye(2), rng).arm
            reward = -2.0
            learner = (
                learner.rested() if arm == NOTHING else learner.learned(np.eye(2)[arm], reward)
            )
            sums.append(learner.earned)
        lowest[allowed] = min(sums)
        if allowed == ALLOWED:
            assert all(s >= -ALLOWED * n - 2.0 for n, s in enumerate(sums))
    assert lowest[ALLOWED] > lowest[np.inf] - 1e-9


def test_choices_come_as_often_as_their_propensity_says() -> None:
    learner = LinearBandit.new(3).learned(np.array([1.0, 0.0, 0.0]), 0.5)
    rng = np.random.default_rng(1)
    choices = [learner.choose(np.eye(3), rng) for _ in range(600)]

    assert all(choice.propensities.sum() == pytest.approx(1.0) for choice in choices)
    for arm in (0, 1, 2, NOTHING):
        share = np.mean([choice.arm == arm for choice in choices])
        said = np.mean([choice.propensities[arm] for choice in choices])
        assert share == pytest.approx(said, abs=0.06)
