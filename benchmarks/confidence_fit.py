"""Fits :class:`esper.policy.confidence.ConfidenceModel` to cases, and measures it on others.

Shape legend: N cases, D coefficients.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from esper.policy.cases import MEASURED, Case
from esper.policy.confidence import (
    FEWEST_CASES,
    ConfidenceModel,
    Subject,
    answer_of,
    logistic,
    standardised,
)

Doubles = NDArray[np.float64]

GROUPS = ("choice", "layer", "finding", "answer", "measured", "training")
_LEVELS = ("choice", "layer", "finding", "answer", "training")
BASE_VARIANCE = 4.0  # of the base rate's logit
LARGEST_VARIANCE = 9.0
SMALLEST_VARIANCE = 1e-4
# Few kinds of adaptation share a variance, and one of them may be unlike the others.
HEAVY_TAILED, FREEDOM = "choice", 4.0  # its effects are from Student's t with so many degrees
FOLDS = 10


def fit(cases: Sequence[Case]) -> ConfidenceModel:
    """The regression on cases of one kind.

    Raises:
        ValueError: there is no case.
    """
    if not cases:
        raise ValueError("confidence needs at least one case")
    centre, scale = _centre_and_scale(cases)
    names, groups, rows = _design(cases, centre, scale)
    success = np.array([case.success for case in cases], dtype=np.float64)
    variances = _variances(rows, success, groups)
    mean, covariance = _posterior(rows, success, groups, variances)
    kept = np.array([group != "training" for group in groups])
    counts: dict[str, int] = {}
    for case in cases:
        counts[case.choice] = counts.get(case.choice, 0) + 1
    return ConfidenceModel(
        names=tuple(name for name, keep in zip(names, kept, strict=True) if keep),
        mean=mean[kept],
        covariance=covariance[np.ix_(kept, kept)],
        training=variances["training"],
        centre=centre,
        scale=scale,
        cases=counts,
        successes=(int(success.sum()), len(cases)),
    )


def _centre_and_scale(cases: Sequence[Case]) -> tuple[dict[str, float], dict[str, float]]:
    centre, scale = {}, {}
    for name in MEASURED:
        values = np.array([case.measured[name] for case in cases if name in case.measured])
        if len(values) >= FEWEST_CASES and values.std() > 1e-9:
            centre[name], scale[name] = (
                round(float(values.mean()), 6),
                round(float(values.std()), 6),
            )
    return centre, scale


def _design(
    cases: Sequence[Case], centre: Mapping[str, float], scale: Mapping[str, float]
) -> tuple[list[str], list[str], Doubles]:
    """(names [D], their groups [D], rows [N, D]); the base comes first."""
    named: dict[str, str] = {"base": "base"}
    for group in _LEVELS:
        named |= {f"{group}:{level}": group for level in sorted({_level(c, group) for c in cases})}
    named |= {f"measured:{name}": "measured" for name in centre}
    place = {name: column for column, name in enumerate(named)}
    rows = np.zeros((len(cases), len(named)))
    for row, case in zip(rows, cases, strict=True):
        row[0] = 1.0
        for group in _LEVELS:
            row[place[f"{group}:{_level(case, group)}"]] = 1.0
        for name, value in standardised(case.measured, centre, scale).items():
            row[place[f"measured:{name}"]] = value
    return list(named), list(named.values()), rows


def _level(case: Case, group: str) -> str:
    if group == "answer":
        return answer_of(case.choice, case.finding)
    return str(getattr(case, group))


def _precisions(groups: Sequence[str], variances: Mapping[str, float]) -> Doubles:
    return np.array([1.0 / variances.get(group, BASE_VARIANCE) for group in groups])


def _variances(rows: Doubles, success: Doubles, groups: Sequence[str]) -> dict[str, float]:
    """The variances of the groups with the largest marginal likelihood."""
    shown = [group for group in GROUPS if group in groups]
    bounds = [(math.log(SMALLEST_VARIANCE), math.log(LARGEST_VARIANCE))] * len(shown)

    last = np.zeros(rows.shape[1])  # the next mode is near it

    def cost(logs: Doubles) -> float:
        nonlocal last
        variances = dict(zip(shown, np.exp(logs), strict=True))
        precision = _precisions(groups, variances)
        last, likelihood, root = _mode(rows, success, precision, last)
        mean = last
        # Laplace: the integral over the coefficients by the curvature at the mode.
        log_prior = 0.5 * float(np.log(precision).sum() - precision @ mean**2)
        # An exponential prior with mean 1 keeps a variance near zero where nothing is shown.
        shrink = float(sum(variances.values()))
        return -(likelihood + log_prior - float(np.log(np.diag(root)).sum())) + shrink

    start = np.full(len(shown), math.log(0.2))
    found = minimize(cost, start, method="L-BFGS-B", bounds=bounds, options={"maxiter": 20})
    return {group: float(value) for group, value in zip(shown, np.exp(found.x), strict=True)}


def _posterior(
    rows: Doubles, success: Doubles, groups: Sequence[str], variances: Mapping[str, float]
) -> tuple[Doubles, Doubles]:
    """(mean [D], covariance [D, D]), by expectation-maximisation over the scales of the t.

    A t is a normal distribution whose variance is drawn for each effect (Gelman et al. 2013,
    Bayesian Data Analysis, chapter 17): effects far from zero are shrunken less.
    """
    usual = _precisions(groups, variances)
    heavy = np.array([group == HEAVY_TAILED for group in groups])
    precision, mean = usual, np.zeros(len(usual))
    for _ in range(50):
        mean, _, root = _mode(rows, success, precision, mean)
        scaled = (FREEDOM + 1.0) / (FREEDOM / usual + mean**2)
        before, precision = precision, np.where(heavy, scaled, usual)
        if float(np.abs(precision - before).max()) < 1e-6:
            break
    half = np.linalg.solve(root, np.eye(len(mean)))
    return mean, half.T @ half


def _mode(
    rows: Doubles, success: Doubles, precision: Doubles, start: Doubles | None = None
) -> tuple[Doubles, float, Doubles]:
    """(mode, its log likelihood, Cholesky root of the curvature), by Newton's method."""
    mean = np.zeros(rows.shape[1]) if start is None else start
    for _ in range(50):
        p = logistic(rows @ mean)
        curvature = (rows * (p * (1 - p))[:, None]).T @ rows + np.diag(precision)
        step = np.linalg.solve(curvature, rows.T @ (success - p) - precision * mean)
        mean = mean + step
        if float(np.abs(step).max()) < 1e-6:
            break
    logits = rows @ mean
    likelihood = float(success @ logits - np.logaddexp(0.0, logits).sum())
    root = np.linalg.cholesky(curvature).astype(np.float64)
    return mean, likelihood, root


# -- on other cases --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a model said of cases of trainings that it was not fitted on.

    Attributes:
        said: [N], the probability; came_true: [N].
        inside: trainings whose share of successes lies in its 95 % interval, of all trainings.
    """

    cases: tuple[Case, ...]
    said: tuple[float, ...]
    came_true: tuple[bool, ...]
    inside: tuple[int, int]


def cross_validated(
    cases: Sequence[Case],
    *,
    by: Callable[[Case], str] = operator.attrgetter("training"),
    folds: int = FOLDS,
) -> HeldOut:
    """Each case is judged by a model that was fitted without the cases of its fold.

    Args:
        by: what no two folds share, for example the training or the host.
        folds: 0: one for each.
    """
    keys = sorted({by(case) for case in cases})
    order = np.random.default_rng(0).permutation(len(keys))
    folds = folds or len(keys)
    fold = {keys[place]: int(turn) % folds for turn, place in enumerate(order)}
    said, inside, counted = np.full(len(cases), math.nan), 0, 0
    for number in range(min(folds, len(keys))):
        known = [case for case in cases if fold[by(case)] != number]
        if not known:
            continue
        model = fit(known)
        judged = [i for i, case in enumerate(cases) if fold[by(case)] == number]
        for i in judged:
            case = cases[i]
            subject = Subject(case.choice, case.layer, case.finding, case.measured)
            said[i] = model.confidence(subject).value
        for training in sorted({cases[i].training for i in judged}):
            own = [cases[i] for i in judged if cases[i].training == training]
            inside += _is_inside(model, own)
            counted += 1
    return HeldOut(
        cases=tuple(cases),
        said=tuple(float(value) for value in said),
        came_true=tuple(case.success for case in cases),
        inside=(inside, counted),
    )


def _is_inside(model: ConfidenceModel, cases: Sequence[Case], draws: int = 2_000) -> bool:
    """The successes of one training are among the middle 95 % of what the model expects."""
    rng = np.random.default_rng(len(cases))
    subjects = [Subject(c.choice, c.layer, c.finding, c.measured) for c in cases]
    rows = np.array([model.row(subject) for subject in subjects])
    effects = rng.multivariate_normal(model.mean, model.covariance, draws)
    own = rng.normal(0.0, math.sqrt(model.training), draws)
    chance = logistic(effects @ rows.T + own[:, None])
    counts = (rng.random(chance.shape) < chance).sum(axis=1)
    low, high = np.quantile(counts, [0.025, 0.975])
    return bool(low <= sum(case.success for case in cases) <= high)
