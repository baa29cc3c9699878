"""Confidence is the probability that an adaptation will be kept; closed cases correct it."""

from __future__ import annotations

from esper.contracts import Experience

PRIOR_CASES = 10.0  # how many closed cases a rule's own confidence counts for


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
