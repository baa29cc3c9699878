"""At which steps a run is measured.

The plan is fixed by steps, and grows with the cost that was measured at fixed steps, so that a run
can be repeated.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

FIRST_STEPS = (1, 2, 3, 5, 10, 20, 30, 40, 50)
FORWARD_STEPS = (1, 10, 30, 50)
SURE_STEPS = (100, 200, 400, 600, 800)  # however little a step takes: a short run is looked at too
PERIOD = 50  # shortest, after the first steps
FORWARD_EVERY = 4  # planned steps
MEASURED_AT = (50, 500, 5_000)  # where the period is set from the cost so far
BUDGET = 0.0025  # of the time of a step
LEAST_SECONDS_PER_STEP = 10e-6  # on short steps, where the rules cost more than that share
LARGEST_BUDGET = 0.01
SCHEDULING = Path("/proc/thread-self/schedstat")  # of Linux: ns on a processor, ns waiting for one


def undisturbed_time() -> float:
    """Seconds, monotonic, without those in which this thread waited for a processor.

    Where other programs take it, a step would seem to last several times longer, so that equal runs
    would be looked at in other steps. Elsewhere than on Linux such waits are not known, and count.
    """
    try:
        waited_s = 1e-9 * int(SCHEDULING.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        waited_s = 0.0
    return time.perf_counter() - waited_s


class Plan:
    """At which steps the run is measured: more closely where it begins, and after a remedy.

    Attributes:
        period: steps between two, after the first ones.
        since: the step after which it began, or had its latest remedy.
    """

    def __init__(self) -> None:
        self.period = PERIOD
        self.since = 0
        self._again = -1
        self._spent = 0.0
        self._largest = 0.0  # of the costs; the first look at a GPU loads code
        self._checks = 0
        self._to_come: tuple[int, ...] = MEASURED_AT

    def is_due(self, step: int) -> bool:
        if step - self.since in FIRST_STEPS or step in SURE_STEPS or step == self._again:
            return True
        return step > FIRST_STEPS[-1] and step % self.period == 0

    def next_due(self, step: int) -> int:
        """The first step after this one that is measured."""
        later = (max(step, FIRST_STEPS[-1]) // self.period + 1) * self.period
        if self._again > step:
            later = min(later, self._again)
        if step >= max(SURE_STEPS[-1], self.since + FIRST_STEPS[-1]):
            return later
        fixed = (*(self.since + due for due in FIRST_STEPS), *SURE_STEPS)
        return min(later, min((due for due in fixed if due > step), default=later))

    def look_again(self, step: int) -> None:
        """What was seen at this step waits for a second look, which no long period delays.

        A second look asks for no third one, so it at most doubles what looking costs.
        """
        if step != self._again:
            self._again = step + PERIOD

    def reads_forward(self, step: int) -> bool:
        return step - self.since in FORWARD_STEPS or (
            step > FIRST_STEPS[-1] and step % (self.period * FORWARD_EVERY) == 0
        )

    def add(self, seconds: float) -> None:
        """Cost of one planned step."""
        self._spent += seconds
        self._largest = max(self._largest, seconds)
        self._checks += 1

    def adapts_at(self, step: int) -> bool:
        """From the fixed steps on, once for each.

        On a GPU a planned step is over with the one after it, when its numbers have arrived.
        """
        return bool(self._to_come) and step >= self._to_come[0]

    def adapt(self, step: int, step_seconds: float) -> None:
        """At such a step, sets the period from what a planned step has cost on average."""
        if not self.adapts_at(step):
            return
        self._to_come = tuple(due for due in self._to_come if due > step)
        if self._checks < 2 or not step_seconds > 0:
            return
        least = min(LARGEST_BUDGET * step_seconds, LEAST_SECONDS_PER_STEP)
        usual = (self._spent - self._largest) / (self._checks - 1)
        needed = usual / max(BUDGET * step_seconds, least)
        # Rounded up to a few values, so that two runs of the same script have the same plan.
        self.period = PERIOD * 2 ** max(0, math.ceil(math.log2(max(1.0, needed / PERIOD))))
