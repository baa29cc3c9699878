"""Confidence is the probability that an adaptation will be kept; here it is held to that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from esper.contracts import Experience

MIN_CASES = 20  # below, any score is mostly chance
PRIOR_CASES = 10.0  # what a rule's own confidence weighs against closed cases


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Cases whose confidence lay in [low, high), the last bin including 1."""

    low: float
    high: float
    cases: int
    mean_confidence: float  # NaN without cases
    kept_share: float  # NaN without cases


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well past confidence foretold what was kept.

    ``note`` is "too few to trust" below ``MIN_CASES`` cases.
    """

    cases: int
    brier: float  # 0 perfect, 0.25 a coin; NaN without cases
    bins: tuple[ReliabilityBin, ...]

    @property
    def trusted(self) -> bool:
        return self.cases >= MIN_CASES

    @property
    def note(self) -> str:
        return "" if self.trusted else "too few to trust"


def posterior_confidence(confidence: float, experience: Experience) -> float:
    """Mean of the Beta posterior: the rule's confidence as prior, closed cases as evidence.

    Args:
        confidence: 0..1 or NaN; it counts as ``PRIOR_CASES`` cases.
        experience: closed cases of the blueprint.

    Returns:
        0..1, NaN where the prior is NaN.
    """
    kept = PRIOR_CASES * confidence + experience.kept
    return kept / (PRIOR_CASES + experience.cases)


def brier_score(confidences: Sequence[float], kept: Sequence[bool]) -> float:
    """Mean of (confidence - outcome)^2 (Brier 1950); pairs without a finite confidence are out."""
    pairs = _pairs(confidences, kept)
    if not pairs:
        return math.nan
    return sum((confidence - outcome) ** 2 for confidence, outcome in pairs) / len(pairs)


def calibration(
    confidences: Sequence[float], kept: Sequence[bool], *, bins: int = 10
) -> Calibration:
    """Score and reliability diagram of closed cases."""
    pairs = _pairs(confidences, kept)
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for confidence, outcome in pairs:
        members[min(bins - 1, int(confidence * bins))].append((confidence, outcome))
    return Calibration(
        cases=len(pairs),
        brier=brier_score(confidences, kept),
        bins=tuple(_bin(i / bins, (i + 1) / bins, cases) for i, cases in enumerate(members)),
    )


def _bin(low: float, high: float, cases: list[tuple[float, bool]]) -> ReliabilityBin:
    count = len(cases)
    return ReliabilityBin(
        low=low,
        high=high,
        cases=count,
        mean_confidence=sum(c for c, _ in cases) / count if count else math.nan,
        kept_share=sum(o for _, o in cases) / count if count else math.nan,
    )


def _pairs(confidences: Sequence[float], kept: Sequence[bool]) -> list[tuple[float, bool]]:
    return [
        (float(confidence), bool(outcome))
        for confidence, outcome in zip(confidences, kept, strict=True)
        if math.isfinite(confidence)
    ]
