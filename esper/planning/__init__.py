"""Several grafts of one run, chosen together: see :mod:`esper.planning.planner`."""

from esper.planning.planner import plan_run
from esper.planning.solver import Budget, Option, Solution, choose, cost_of

__all__ = ["Budget", "Option", "Solution", "choose", "cost_of", "plan_run"]
