"""Confidence: the probability that an adaptation really helps.

A graft helps when its held-out loss is more than 0.5 % below that of a twin that was trained
without it; a remedy helps when its symptom goes and stays away.

The probability comes from cases (:mod:`esper.policy.cases`) by logistic regression with partial
pooling over the kind of adaptation, the kind of layer, the finding, the adaptation as an answer to
that finding, and the training; and with one slope for each measured number:

    logit p = base + choice + layer + finding + answer + slopes · measured + training

Each group's effects are drawn from a normal distribution around zero whose variance is estimated
from the cases (empirical Bayes, with Laplace's approximation of the marginal likelihood; Gelman et
al. 2013, Bayesian Data Analysis, chapters 5, 13 and 15). A group that tells nothing gets a variance
near zero, and then the answer is the base rate. The effects of the kinds of adaptation have the
tails of Student's t, so that one kind that is unlike the others is not taken for one of them. A new
training has an effect of its own that is not known; the probability is the mean over it.

Own closed cases of an installation move the base rate and the kinds of adaptation that they are of.

Shape legend: N cases, D coefficients, G groups.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper.contracts import Experience
from esper.policy.cases import MEASURED

Doubles = NDArray[np.float64]

PRIOR_CASES = 10.0  # how many closed cases a caller's own confidence counts for
FEWEST_CASES = 20  # below, the numbers are too few to trust
MOST_DEVIATIONS = 1.5  # a measured number counts as at most so far from the mean of the cases
NEW_VARIANCE = 0.5  # of the effect of a kind of adaptation that the table does not have
# Nodes and weights of Gauss and Hermite for the mean over a normal distribution.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True, slots=True)
class Term:
    """What one thing adds to a confidence; the weights of all terms sum to it."""

    name: str
    observed: float
    weight: float
    text: str


@dataclass(frozen=True, slots=True)
class Confidence:
    """A probability with its 95 % interval.

    Attributes:
        low, high: of the probability, for a training whose own effect is not known.
        cases: of the same kind of adaptation, in the table and of this installation.
    """

    value: float
    low: float
    high: float
    cases: int
    terms: tuple[Term, ...]

    @property
    def trusted(self) -> bool:
        """There are enough cases of this kind of adaptation."""
        return self.cases >= FEWEST_CASES

    @property
    def about(self) -> str:
        """The interval, and how many cases there are, in words."""
        few = "" if self.trusted else f", too few to trust, {FEWEST_CASES} are needed"
        return (
            f"between {self.low:.0%} and {self.high:.0%} (95%), "
            f"from {self.cases} cases of this kind{few}"
        )


def corrected(confidence: float, closed: Experience) -> Confidence:
    """A caller's own confidence, corrected by closed cases.

    Mean and 95 % interval of the Beta posterior: the confidence as prior, which counts as
    ``PRIOR_CASES`` cases, closed cases as evidence.

    Args:
        confidence: 0..1.
        closed: cases of the blueprint.
    """
    cases = PRIOR_CASES + closed.cases
    value = (PRIOR_CASES * confidence + closed.kept) / cases
    error = 1.96 * math.sqrt(value * (1 - value) / (cases + 1))
    return Confidence(
        value=value,
        low=max(0.0, value - error),
        high=min(1.0, value + error),
        cases=closed.cases,
        terms=(
            Term("as_given", confidence, confidence, "the confidence that the caller gave"),
            Term("own_cases", closed.cases, value - confidence, "closed cases of the blueprint"),
        ),
    )


@dataclass(frozen=True, slots=True)
class Subject:
    """What a probability is asked for; see :class:`esper.policy.cases.Case`."""

    choice: str
    layer: str
    finding: str
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class ConfidenceModel:
    """The fitted regression of one kind of cases, without the effects of single trainings.

    Attributes:
        names: of the coefficients, ``base`` or ``group:level`` or ``measured:name``.
        mean: [D], their posterior mean; covariance: [D, D].
        training: variance of the effect of a training.
        centre, scale: of the measured numbers in the cases.
        cases: by choice.
        successes: of all cases, with their number.
    """

    names: tuple[str, ...]
    mean: Doubles
    covariance: Doubles
    training: float
    centre: Mapping[str, float]
    scale: Mapping[str, float]
    cases: Mapping[str, int]
    successes: tuple[int, int]

    @property
    def base(self) -> float:
        """The share of all cases that succeeded."""
        return self.successes[0] / max(1, self.successes[1])

    def confidence(
        self, subject: Subject, own: Mapping[str, Experience] | None = None
    ) -> Confidence:
        """The probability that ``subject`` helps.

        Args:
            own: closed cases of this installation, by choice.
        """
        model, seen = self, own or {}
        counts = [(slug, int(one.kept), int(one.cases)) for slug, one in seen.items()]
        closed = tuple(sorted(count for count in counts if count[2]))
        if closed:
            model = _updated(self, closed, tuple(self.row(subject).tolist()))
        row = model.row(subject)
        logit = float(row @ model.mean)
        error = math.sqrt(max(0.0, float(row @ model.covariance @ row)))
        spread = math.hypot(error, math.sqrt(model.training))
        value = mean_probability(logit, spread)
        low, high = logistic(logit + spread * np.array([-1.96, 1.96]))
        return Confidence(
            value=value,
            low=float(low),
            high=float(high),
            cases=self.cases.get(subject.choice, 0) + seen.get(subject.choice, Experience()).cases,
            terms=tuple(model._terms(subject, row, value, spread)),
        )

    def row(self, subject: Subject) -> Doubles:
        """[D]: which coefficients count, and how much. An unknown level counts for none."""
        values = {
            "base": 1.0,
            f"choice:{subject.choice}": 1.0,
            f"layer:{subject.layer}": 1.0,
            f"finding:{subject.finding}": 1.0,
            f"answer:{answer_of(subject.choice, subject.finding)}": 1.0,
        }
        for name, value in standardised(subject.measured, self.centre, self.scale).items():
            values[f"measured:{name}"] = value
        return np.array([values.get(name, 0.0) for name in self.names])

    def _terms(self, subject: Subject, row: Doubles, value: float, spread: float) -> list[Term]:
        """The base rate, then what each coefficient adds in proportion to its part of the logit."""
        parts = row * self.mean
        base = mean_probability(float(parts[0]), spread)
        helped, cases = self.successes
        text = f"{helped} of {cases} cases helped; the rate that a usual training has"
        terms = [Term("base_rate", helped / max(1, cases), base, text)]
        total = float(parts[1:].sum())
        slope = (value - base) / total if abs(total) > 1e-9 else 0.0
        for name, part in zip(self.names[1:], parts[1:], strict=True):
            if part:
                terms.append(_term(name, float(part) * slope, subject, self.cases))
        return terms

    def to_wire(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "mean": [round(float(value), 6) for value in self.mean],
            "covariance": [[round(float(v), 6) for v in row] for row in self.covariance],
            "training": round(self.training, 6),
            "centre": dict(self.centre),
            "scale": dict(self.scale),
            "cases": dict(self.cases),
            "successes": list(self.successes),
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> ConfidenceModel:
        return cls(
            names=tuple(data["names"]),
            mean=np.array(data["mean"]),
            covariance=np.array(data["covariance"]),
            training=float(data["training"]),
            centre=data["centre"],
            scale=data["scale"],
            cases=data["cases"],
            successes=(int(data["successes"][0]), int(data["successes"][1])),
        )


def answer_of(choice: str, finding: str) -> str:
    """Level of the interaction of an adaptation with the finding that it answers."""
    return f"{choice} to {finding or 'no finding'}"


def logistic(logits: Doubles) -> Doubles:
    """1 / (1 + e^-x), without overflow."""
    halves: Doubles = np.tanh(0.5 * logits)
    return 0.5 * (1.0 + halves)


def mean_probability(logit: float, spread: float) -> float:
    """Mean of the logistic function over a normal distribution."""
    return float(_WEIGHTS @ logistic(logit + spread * _NODES))


def standardised(
    measured: Mapping[str, float], centre: Mapping[str, float], scale: Mapping[str, float]
) -> dict[str, float]:
    """Deviations from the mean of the cases; an unknown number is the mean."""
    found = {}
    for name in MEASURED:
        if name in measured and name in centre and math.isfinite(measured[name]):
            value = (measured[name] - centre[name]) / scale[name]
            found[name] = max(-MOST_DEVIATIONS, min(MOST_DEVIATIONS, value))
    return found


def _term(name: str, weight: float, subject: Subject, cases: Mapping[str, int]) -> Term:
    group, _, level = name.partition(":")
    if group == "measured":
        return Term(level, subject.measured.get(level, math.nan), weight, MEASURED[level])
    text = {
        "choice": f"{cases.get(level, 0)} cases of {level}",
        "layer": f"cases at {level} layers",
        "finding": f"cases with the finding {level}" if level else "cases without a finding",
        "answer": f"cases of {level}",
    }[group]
    return Term(group, math.nan, weight, text)


# -- own cases -------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _updated(
    model: ConfidenceModel, closed: tuple[tuple[str, int, int], ...], like: tuple[float, ...]
) -> ConfidenceModel:
    """The model after an installation's own closed cases.

    The shipped posterior is the prior now; a choice that the table does not know gets an effect of
    its own. What the trainings of this installation have in common moves the base.

    Args:
        closed: (choice, kept, cases).
        like: the row of what is asked for; own cases are taken to have been like it, because
            their own numbers are not kept.
    """
    new = [f"choice:{slug}" for slug, *_ in closed if f"choice:{slug}" not in model.names]
    names, size = [*model.names, *new], len(model.names)
    total = len(names)
    prior_mean, prior = np.zeros(total), np.diag(np.full(total, NEW_VARIANCE))
    prior_mean[:size], prior[:size, :size] = model.mean, model.covariance
    prior[0, 0] += model.training
    rows = _rows_like(like, model.names, names, [slug for slug, *_ in closed])
    kept = np.array([one[1] for one in closed], dtype=np.float64)
    cases = np.array([one[2] for one in closed], dtype=np.float64)
    mean, covariance = _posterior(prior_mean, prior, rows, kept, cases)
    done = int(cases.sum())
    return ConfidenceModel(
        names=tuple(names),
        mean=mean,
        covariance=covariance,
        training=model.training,
        centre=model.centre,
        scale=model.scale,
        cases=model.cases,
        successes=(model.successes[0] + int(kept.sum()), model.successes[1] + done),
    )


def _rows_like(
    like: Sequence[float], known: Sequence[str], names: Sequence[str], slugs: Sequence[str]
) -> Doubles:
    """float64 [slugs, names]: the row of what is asked for, with each of these choices instead.

    Args:
        like: by the names of ``known``, which ``names`` begins with.
    """
    rows = np.zeros((len(slugs), len(names)))
    for place, (name, value) in enumerate(zip(known, like, strict=True)):
        rows[:, place] = 0.0 if name.startswith(("choice:", "answer:")) else value
    findings = [name for name, value in zip(known, like, strict=True)
                if value and name.startswith("finding:")]  # fmt: skip
    for row, slug in zip(rows, slugs, strict=True):
        row[names.index(f"choice:{slug}")] = 1.0
        for finding in findings:
            answer = f"answer:{answer_of(slug, finding.removeprefix('finding:'))}"
            if answer in names:
                row[names.index(answer)] = 1.0
    return rows


def _posterior(
    prior_mean: Doubles,
    prior: Doubles,
    rows: Doubles,
    kept: Doubles,
    cases: Doubles,
) -> tuple[Doubles, Doubles]:
    """(mean, covariance) after so many cases of each row, of which so many were kept.

    Newton's steps in the space of the few rows, so that no large matrix is inverted.
    """
    mean, covariance = prior_mean, prior
    logits = rows @ prior_mean
    for _ in range(50):
        p = logistic(logits)
        weight = np.maximum(cases * p * (1 - p), 1e-9)
        working = logits + (kept - cases * p) / weight
        gain = prior @ rows.T @ np.linalg.inv(rows @ prior @ rows.T + np.diag(1.0 / weight))
        mean = prior_mean + gain @ (working - rows @ prior_mean)
        covariance = prior - gain @ rows @ prior
        step = rows @ mean - logits
        logits = logits + np.clip(step, -1.0, 1.0)  # from far away a whole step overshoots
        if float(np.abs(step).max()) < 1e-8:
            break
    return mean, covariance


@cache
def shipped_models() -> dict[str, ConfidenceModel]:
    """By kind of case; fitted on the shipped table by ``python -m benchmarks.confidence``."""
    text = resources.files("esper.policy").joinpath("confidence.json").read_text("utf-8")
    return {kind: ConfidenceModel.from_wire(data) for kind, data in json.loads(text).items()}
