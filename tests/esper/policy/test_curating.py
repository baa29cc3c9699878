"""The challenger decides only after the log has shown that it would do better."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.latency import flat_run
from esper import blueprints
from esper.contracts import AdaptationDecision, AdaptationType, Decision, Experience, SafetyPolicy
from esper.health import extract_features
from esper.pipeline import chances, decide
from esper.policy import BanditPolicy, HeuristicPolicy, Proposals
from esper.policy.base import chance_of
from esper.policy.curating import FEWEST_CASES, NEWEST, Outcome, standing
from esper.policy.learned import _prior
from esper.selection import BlueprintSelector

OLD, NEW = "heuristic-3", "bandit-1"
FULL = {OLD: 1.0, NEW: 1.0}
SELECTOR = BlueprintSelector(blueprints.list_blueprints())


def judged(outcomes: Sequence[Outcome]) -> str:
    return standing(outcomes, incumbent=OLD, challenger=NEW).champion


def log(better: float, rounds: int = 200, seed: int = 0, share: float = 0.5) -> list[Outcome]:
    """Two arms, drawn evenly; the challenger takes the second with ``share``, whose reward is
    higher by ``better``."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rounds):
        second = bool(rng.integers(2))
        shares = {OLD: 0.5, NEW: share if second else 1.0 - share, "log": 0.5}
        found.append(Outcome("log", shares, better * second + 0.05 * rng.standard_normal()))
    return found


def test_it_is_promoted_where_it_is_shown_to_be_better_and_not_otherwise() -> None:
    assert judged(log(better=0.2, share=0.95)) == NEW
    assert judged(log(better=-0.2, share=0.95)) == OLD
    assert judged(log(better=0.2, share=0.5)) == OLD  # it decides as the champion does


def test_noise_alone_promotes_it_rarely() -> None:
    promoted = sum(judged(log(better=0.0, share=0.9, seed=seed)) == NEW for seed in range(100))
    assert promoted <= 8  # 2.5 % on one side


def test_few_effective_cases_promote_nobody() -> None:
    few = log(better=0.5, rounds=int(FEWEST_CASES) - 2, share=0.95)
    found = standing(few, incumbent=OLD, challenger=NEW)
    assert found.champion == OLD
    assert "effective cases" in found.reason
    never = [Outcome(OLD, {OLD: 1.0, NEW: 0.0}, 0.1)] * 500
    assert standing(never, incumbent=OLD, challenger=NEW).cases == 0.0
    assert judged([]) == OLD


def test_it_is_demoted_by_itself_when_the_newest_cases_tell_otherwise() -> None:
    good, bad = log(better=0.2, share=0.95), log(better=-0.4, rounds=NEWEST, share=0.95, seed=1)
    assert judged(good) == NEW
    assert judged(good + bad) == OLD


@pytest.mark.parametrize(
    "odd",
    [
        Outcome(OLD, FULL, math.nan),
        Outcome(OLD, {OLD: 0.0, NEW: 1.0}, 99.0),
        Outcome(OLD, {OLD: 1.0}, 99.0),
        Outcome("someone", FULL, 99.0),
    ],
    ids=["no reward", "impossible", "challenger unknown", "decider unknown"],
)
def test_a_case_without_what_is_needed_tells_nothing(odd: Outcome) -> None:
    outcomes = log(better=0.0, share=0.9)
    plain = standing(outcomes, incumbent=OLD, challenger=NEW)
    assert standing([*outcomes, *([odd] * 50)], incumbent=OLD, challenger=NEW) == plain


def test_the_logged_chance_of_a_draw_is_how_often_it_is_made() -> None:
    """Also where a gate blocks an arm: the rest is drawn with its own shares."""
    arms = tuple(
        (AdaptationDecision(name, AdaptationType.ADD_FFN, math.nan), share)
        for name, share in (("a", 0.5), ("b", 0.3))
    )
    proposals = Proposals((arms[1][0],), arms=arms, nothing=0.2)
    assert chance_of(proposals, arms[1][0], []) == pytest.approx(0.3)
    assert chance_of(proposals, arms[1][0], [arms[0][0]]) == pytest.approx(0.6)
    certain = Proposals(tuple(arm for arm, _ in arms))
    assert chance_of(certain, arms[0][0], []) == 1.0
    assert chance_of(certain, arms[1][0], []) == 0.0
    assert chance_of(certain, arms[1][0], [arms[0][0]]) == 1.0


def test_the_bandit_is_a_policy_with_exact_chances() -> None:
    run, limits = flat_run(8, spans=True), SafetyPolicy(confidence_refuse=0.0)
    policy, made = BanditPolicy(SELECTOR.types), 0
    drawn: dict[str, int] = {}
    expected: dict[str, float] = {}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        answer = decide(run, policy, SELECTOR, limits, rng)
        if isinstance(answer, Decision):
            made += 1
            layer = f"{answer.adaptation.layer_name} {answer.adaptation.adaptation_type}"
            drawn[layer] = drawn.get(layer, 0) + 1
            found = chances(
                answer, run, [policy, HeuristicPolicy()], SELECTOR, limits,
                lambda seed=seed: np.random.default_rng(seed),
            )  # fmt: skip
            assert 0.0 < found[NEW] <= 1.0
            assert found[OLD] in (0.0, 1.0)
            expected[layer] = found[NEW]
    most = max(drawn, key=lambda layer: drawn[layer])
    assert drawn[most] / 60 == pytest.approx(expected[most], abs=0.25)
    assert made > 0


def test_without_experience_only_the_shipped_cases_count() -> None:
    run = flat_run(8, spans=True)
    features = extract_features(run, SELECTOR.types)
    policy = BanditPolicy(SELECTOR.types)
    assert policy._posterior({}) is _prior(tuple(sorted(SELECTOR.types.items())))
    learned = policy._posterior({"widen_hidden": Experience(0, 50, -0.5)})
    assert not np.array_equal(learned.pull, policy._posterior({}).pull)
    healthy = policy.propose(flat_run(8), features, np.random.default_rng(0))
    assert healthy.reasons or healthy.arms


def test_a_run_without_the_finding_gets_no_arm() -> None:
    from dataclasses import replace

    run = replace(flat_run(8), findings=())
    features = extract_features(run, SELECTOR.types)
    found = BanditPolicy(SELECTOR.types).propose(run, features, np.random.default_rng(0))
    assert (found.decisions, found.arms) == ((), ())
    assert found.reasons
