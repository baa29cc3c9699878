"""What to propose for a run, ranked, with reasons and a confidence."""

from esper.policy.base import Policy, Proposals
from esper.policy.heuristic import HeuristicPolicy

__all__ = [
    "HeuristicPolicy",
    "Policy",
    "Proposals",
]
