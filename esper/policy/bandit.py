"""A contextual bandit: Thompson sampling on a linear model of the reward, never far below nothing.

    reward = weights · context + noise        a normal prior and known noise give a normal posterior
    choose    draw weights, take the arm with the largest reward; "do nothing" is an arm of reward 0
    propensity   the share of many such draws that takes an arm; one arm is drawn from these shares,
                 so that the logged propensity is exact (Horvitz and Thompson need it)
    cautious  an arm whose lower bound could bring the sum of rewards below a stated share of doing
              nothing is left out (Kazerouni et al. 2017, Conservative contextual linear bandits)

Shape legend: A arms, D members of a context, S draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

DRAWS = 400
EXPLORATION = 0.5  # of the deviation of the posterior; the whole of it explores too much
NOTHING = -1  # place of "do nothing"
BOUND = 1.64  # deviations of the lower bound, 95 % on one side


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What was chosen, and what else could have been.

    Attributes:
        arm: place in the arms, or :data:`NOTHING`.
        propensity: the probability with which it was chosen.
        propensities: float64 [A + 1], of all arms; the last is "do nothing".
        scores: float64 [A], expected rewards.
    """

    arm: int
    propensity: float
    propensities: Doubles
    scores: Doubles


@dataclass(frozen=True, slots=True, eq=False)
class LinearBandit:
    """The posterior of the weights; ``learned`` returns a new one.

    Attributes:
        precision: float64 [D, D]; pull: float64 [D], precision times mean.
        noise: standard deviation of a reward.
        earned: sum of the rewards so far; rounds: how many there were.
        allowed: reward per round by which it may be below doing nothing; inf: no such limit.
    """

    precision: Doubles
    pull: Doubles
    noise: float = 1.0
    earned: float = 0.0
    rounds: int = 0
    allowed: float = math.inf

    @classmethod
    def new(
        cls, size: int, *, noise: float = 1.0, spread: float = 1.0, allowed: float = math.inf
    ) -> LinearBandit:
        """Without a case: each weight is normal around zero with deviation ``spread``."""
        return cls(np.eye(size) / spread**2, np.zeros(size), noise, allowed=allowed)

    @property
    def mean(self) -> Doubles:
        """float64 [D], of the weights."""
        return np.asarray(np.linalg.solve(self.precision, self.pull), dtype=np.float64)

    def choose(self, contexts_AD: Doubles, rng: np.random.Generator) -> Choice:
        """One arm, or nothing."""
        count = len(contexts_AD)
        root = np.linalg.cholesky(np.linalg.inv(self.precision))
        noise_SD = EXPLORATION * rng.standard_normal((DRAWS, len(self.mean)))
        drawn_SD = self.mean + noise_SD @ root.T
        scores_A = contexts_AD @ self.mean
        rewards_SA = np.zeros((DRAWS, count + 1))
        rewards_SA[:, :count] = np.where(self._may(contexts_AD), drawn_SD @ contexts_AD.T, -np.inf)
        taken = np.bincount(rewards_SA.argmax(axis=1), minlength=count + 1)
        propensities = taken / DRAWS
        arm = int(rng.choice(count + 1, p=propensities))
        return Choice(
            arm=NOTHING if arm == count else arm,
            propensity=float(propensities[arm]),
            propensities=propensities,
            scores=scores_A,
        )

    def _may(self, contexts_AD: Doubles) -> NDArray[np.bool_]:
        """bool [A]: even at its lower bound the sum of rewards stays above the limit."""
        if math.isinf(self.allowed):
            return np.ones(len(contexts_AD), dtype=bool)
        covariance = np.linalg.inv(self.precision)
        error_A = np.sqrt(np.einsum("ad,de,ae->a", contexts_AD, covariance, contexts_AD))
        low_A = contexts_AD @ self.mean - BOUND * error_A
        limit = -self.allowed * (self.rounds + 1)
        return np.asarray(self.earned + low_A >= limit)

    def learned(self, context_D: Doubles, reward: float) -> LinearBandit:
        """After one reward."""
        return LinearBandit(
            precision=self.precision + np.outer(context_D, context_D) / self.noise**2,
            pull=self.pull + context_D * reward / self.noise**2,
            noise=self.noise,
            earned=self.earned + reward,
            rounds=self.rounds + 1,
            allowed=self.allowed,
        )

    def rested(self) -> LinearBandit:
        """After a round in which nothing was done."""
        return LinearBandit(
            self.precision, self.pull, self.noise, self.earned, self.rounds + 1, self.allowed
        )
