"""The names of a run's metrics, and how many it may have.

Without a limit, a script that puts the step into a metric's name would fill the database.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from apps.runs.models import Run
from apps.telemetry.models import Metric

MOST_NAMES = 500
RUNS_REMEMBERED = 1_000

# Of this process. Another process may add a few more names at the same time, which is harmless.
_known: OrderedDict[str, set[str]] = OrderedDict()


class KnownNames:
    """The names that a run uses already, and whether it may have one more."""

    def __init__(self, run: Run) -> None:
        self._names = _names_of(run)

    def take(self, name: str) -> bool:
        """True where a value of this name may be stored; a new name counts from now on."""
        if name in self._names:
            return True
        if len(self._names) >= MOST_NAMES:
            return False
        self._names.add(name)
        return True


def _names_of(run: Run) -> set[str]:
    names = _known.pop(run.uid, None)
    if names is None:
        names = set(_stored_names(run))
    _known[run.uid] = names  # the most recently used one is last
    if len(_known) > RUNS_REMEMBERED:
        _known.popitem(last=False)
    return names


def _stored_names(run: Run) -> Iterable[str]:
    """One index lookup for each name: DISTINCT would read every metric of the run."""
    names = Metric.objects.filter(run=run).order_by("name").values_list("name", flat=True)
    name = names.first()
    while name is not None:
        yield name
        name = names.filter(name__gt=name).first()
