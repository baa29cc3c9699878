"""What happens to a run, mirrored into the trackers that its user has: ``attach(trackers=[…])``.

A tracker gets one :class:`Event` for each finding, proposal, graft, remedy and verdict, and where
it has ``report`` the :class:`Progress` of the run. It is written in a thread of its own: a slow or
broken tracker never delays or ends the training, and is left out after some failures. Adapters of a
few lines each are here; anything with ``write`` and ``close`` is a tracker too.
"""

from esper.sdk.tracking.events import Event, Progress, ProgressTracker, Tracker
from esper.sdk.tracking.kubeflow import Kubeflow
from esper.sdk.tracking.mirror import MAX_FAILURES, Mirror
from esper.sdk.tracking.trackers import trackers_of

__all__ = [
    "MAX_FAILURES",
    "Event",
    "Kubeflow",
    "Mirror",
    "Progress",
    "ProgressTracker",
    "Tracker",
    "trackers_of",
]
