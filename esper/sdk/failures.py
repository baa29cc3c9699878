"""The parts of a session fail one by one: none of them ends the training or another part."""

from __future__ import annotations

import logging
from collections.abc import Callable

from esper.fail_closed import FailClosed, is_the_scripts

logger = logging.getLogger("esper")

MOST_FAILURES = 3
# What is missing without a part of a step.
UNMEASURED = {
    "opening": "The layers are not known, so nothing is measured.",
    "averages": "A running average that the script keeps by itself may get no graft.",
    "schedules": "Grafts that replace their layer stay at their present share.",
    "ledger": "Esper does not check that the optimizer trains all that it should.",
    "compiler": "Recompilations are not counted.",
    "compiling ahead": "Grafts are compiled in the training thread.",
    "guard": "Nobody looks for a loss that diverges.",
    "written weights": "Esper does not notice that the script puts other weights in.",
    "good states": "The run cannot be rewound.",
    "shadow": "Nothing is tried in shadow.",
    "remedies": "No remedy is proposed for a finding.",
    "commands": "Commands of the server are not carried out.",
    "evaluation": "The held-out loss is not measured.",
    "health": "No health frames are made.",
    "diagnosis": "Nobody looks for faults of the run.",
}


class Failures:
    """Calls the parts of a session; a part that keeps failing is left out from then on.

    Args:
        fail_closed: where a part that is left out is reported.

    Attributes:
        counts: part -> how often it has failed.
    """

    def __init__(self, fail_closed: FailClosed) -> None:
        self._fail_closed = fail_closed
        self.counts: dict[str, int] = {}

    def contain(self, part: str, work: Callable[[], None]) -> None:
        """Call ``work``; an exception of it is logged, and the training goes on.

        Args:
            part: a name of :data:`UNMEASURED`.
        """
        if self.counts.get(part, 0) >= MOST_FAILURES:
            return
        try:
            work()
        except Exception as error:
            if is_the_scripts(error):
                raise
            self.counts[part] = self.counts.get(part, 0) + 1
            if self.counts[part] == 1:
                logger.exception("Esper's %s failed; training goes on", part)
            if self.counts[part] == MOST_FAILURES:
                self._fail_closed.switch_off(error, part=part, unmeasured=UNMEASURED[part])
