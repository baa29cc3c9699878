"""What to propose for a run, ranked, with reasons and a confidence."""

from esper.policy.base import Policy, Proposals
from esper.policy.heuristic import HeuristicPolicy
from esper.policy.learned import BanditPolicy

__all__ = [
    "BanditPolicy",
    "HeuristicPolicy",
    "Policy",
    "Proposals",
]
