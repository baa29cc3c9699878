"""Regret of the bandit against random, greedy and the rule "the cheapest first".

    python -m benchmarks.bandit [--quick] [--json FILE]

Each round is a run in need of an adaptation: some arms with a context, and doing nothing, whose
reward is zero. Regret is the expected reward of the best arm minus that of the chosen one.

``kinds``: four of eight kinds of adaptation are offered; each kind has a mean reward of its own,
drawn anew for each seed, and three measured numbers add a little. ``contexts``: only such numbers
count, and they differ so much between rounds that no policy needs to explore. ``cases``: the
trainings of the shipped table of real cases in random order; the arms are the grafts that were
tried in a training, the rewards their gains, at most one and at least minus one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esper.policy.bandit import NOTHING, LinearBandit
from esper.policy.cases import MEASURED, shipped

Doubles = NDArray[np.float64]
Round = tuple[Doubles, Doubles, Doubles]  # contexts [A, D], noisy and expected rewards [A]

ARMS, KINDS, SIZE, NOISE, ROUNDS, SEEDS = 4, 8, 6, 0.5, 300, 40
ALLOWED = 0.25  # reward per round by which the cautious bandit may be below nothing
CHEAPEST = ("proj_ia3", "proj_lora_64", "proj_lora_ia3", "expert_mlp_1d", "mlp_gelu_2048")


def kinds(seed: int, rounds: int) -> list[Round]:
    rng = np.random.default_rng(seed)
    means = np.sort(rng.normal(-0.1, 0.5, KINDS))  # the cheapest adds least, on the average
    means = means[np.argsort(np.arange(KINDS) + rng.normal(0.0, KINDS, KINDS))]
    slopes = rng.normal(0.0, 0.1, 3)
    found = []
    for _ in range(rounds):
        offered = np.sort(rng.choice(KINDS, ARMS, replace=False))
        numbers = rng.normal(0.0, 1.0, (ARMS, 3))
        expected = means[offered] + numbers @ slopes
        contexts = np.hstack([np.eye(KINDS)[offered], numbers])
        found.append((contexts, expected + rng.normal(0.0, NOISE, ARMS), expected))
    return found


def contexts(seed: int, rounds: int) -> list[Round]:
    rng = np.random.default_rng(seed)
    weights = rng.normal(0.0, 0.5, SIZE)
    found = []
    for _ in range(rounds):
        numbers = np.hstack([rng.normal(0.0, 1.0, (ARMS, SIZE)), np.ones((ARMS, 1))])
        expected = numbers[:, :-1] @ weights - 0.5
        found.append((numbers, expected + rng.normal(0.0, NOISE, ARMS), expected))
    return found


def replayed(seed: int, rounds: int) -> list[Round]:
    """Rounds of real cases; as many as there are trainings, at most ``rounds``."""
    trainings = defaultdict(list)
    for case in shipped():
        if case.kind == "graft":
            trainings[case.training].append(case)
    slugs = sorted({case.choice for cases in trainings.values() for case in cases})
    found = []
    for cases in trainings.values():
        order = sorted(cases, key=lambda case: _cost(case.choice))
        contexts = np.array(
            [
                [float(case.choice == slug) for slug in slugs]
                + [case.measured.get(name, 0.0) for name in MEASURED]
                + [1.0]
                for case in order
            ]
        )
        gains = np.clip([case.gain for case in order], -1.0, 1.0)
        found.append((contexts, gains, gains))
    shuffled = np.random.default_rng(seed).permutation(len(found))
    return [found[place] for place in shuffled][:rounds]


def _cost(slug: str) -> int:
    return CHEAPEST.index(slug) if slug in CHEAPEST else len(CHEAPEST)


Player = Callable[[Sequence[Round], int], float]


def random_arm(rounds: Sequence[Round], seed: int) -> float:
    rng = np.random.default_rng(seed)
    return sum(_regret(one, int(rng.integers(-1, len(one[0])))) for one in rounds)


def cheapest(rounds: Sequence[Round], seed: int) -> float:
    return sum(_regret(one, 0) for one in rounds)


def greedy(rounds: Sequence[Round], seed: int) -> float:
    """The largest mean so far, without exploring."""
    bandit, total = LinearBandit.new(rounds[0][0].shape[1], noise=NOISE), 0.0
    for one in rounds:
        scores = one[0] @ bandit.mean
        arm = int(scores.argmax()) if scores.max() >= 0 else NOTHING
        bandit = _after(bandit, one, arm)
        total += _regret(one, arm)
    return total


def bandit(rounds: Sequence[Round], seed: int, allowed: float = math.inf) -> float:
    rng, total = np.random.default_rng(seed), 0.0
    learner = LinearBandit.new(rounds[0][0].shape[1], noise=NOISE, allowed=allowed)
    for one in rounds:
        arm = learner.choose(one[0], rng).arm
        learner = _after(learner, one, arm)
        total += _regret(one, arm)
    return total


def cautious(rounds: Sequence[Round], seed: int) -> float:
    return bandit(rounds, seed, ALLOWED)


def _after(learner: LinearBandit, one: Round, arm: int) -> LinearBandit:
    return learner.rested() if arm == NOTHING else learner.learned(one[0][arm], float(one[1][arm]))


def _regret(one: Round, arm: int) -> float:
    best = max(0.0, float(one[2].max()))
    return best - (0.0 if arm == NOTHING else float(one[2][arm]))


PLAYERS: dict[str, Player] = {
    "random": random_arm,
    "cheapest first": cheapest,
    "greedy": greedy,
    "bandit": bandit,
    "bandit, cautious": cautious,
}


def measured(
    world: Callable[[int, int], list[Round]], seeds: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """(mean regret of a round, half width of its 95 % interval over the seeds) of each player."""
    found: dict[str, tuple[float, float]] = {}
    drawn = [world(seed, rounds) for seed in range(seeds)]
    for name, play in PLAYERS.items():
        each = np.array([play(one, seed) / len(one) for seed, one in enumerate(drawn)])
        found[name] = float(each.mean()), float(1.96 * each.std(ddof=1) / math.sqrt(seeds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="10 seeds")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    seeds = 10 if given.quick else SEEDS
    results = {
        name: measured(world, seeds, ROUNDS)
        for name, world in {"kinds": kinds, "contexts": contexts, "cases": replayed}.items()
    }
    for name, found in results.items():
        print(f"{name}: mean regret of a round, {seeds} seeds")
        for player, (mean, half) in found.items():
            print(f"  {player:18} {mean:.3f} ± {half:.3f}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
