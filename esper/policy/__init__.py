"""What to propose for a run, ranked, with reasons; and how good the confidence has been."""

from esper.policy.base import Policy, Proposals
from esper.policy.calibration import (
    MIN_CASES,
    Calibration,
    ReliabilityBin,
    brier_score,
    calibration,
    posterior_confidence,
)
from esper.policy.heuristic import HeuristicPolicy

__all__ = [
    "MIN_CASES",
    "Calibration",
    "HeuristicPolicy",
    "Policy",
    "Proposals",
    "ReliabilityBin",
    "brier_score",
    "calibration",
    "posterior_confidence",
]
