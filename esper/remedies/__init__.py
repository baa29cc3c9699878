"""Remedies: small changes of a run that answer a finding, each with an undo.

base.py          what a remedy is
catalog/         one remedy in each file
dead_units.py    units that do not fire any more
good_states.py   earlier states of the run, to go back to
state_folder.py  the same on disk, for a run that goes on after a restart
update_hooks.py  work inside an optimizer's step
"""

from esper.remedies.applying import apply_remedy, refusal, resume_remedy
from esper.remedies.base import Batch, Effect, Remedy, Stop, Target
from esper.remedies.good_states import GoodStates
from esper.remedies.registry import get_remedy, list_remedies

__all__ = [
    "Batch",
    "Effect",
    "GoodStates",
    "Remedy",
    "Stop",
    "Target",
    "apply_remedy",
    "get_remedy",
    "list_remedies",
    "refusal",
    "resume_remedy",
]
