"""Tells when a run whose learning rate was chosen anew only moves about at that rate.

Without the rate's schedule, which the script made for another rate, the loss of such a run ends at
the noise of its updates. A run that has learned nothing yet is not judged: it may need its rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from esper.remedies.good_states import START_STEPS
from esper.sdk.run_state import RunState
from esper.sdk.treatments import Treatment

WINDOW = 80  # losses that are compared with as many before
EVERY = 10  # steps between two looks
LEARNED = 0.8  # loss / first loss; above it, nothing is judged
ERRORS = 0.5  # standard errors of the difference by which it must fall


class Settling:
    """Looks at the losses since the last change of the run."""

    def __init__(self) -> None:
        self._looked_at = 0

    def next_step(self, treatments: Sequence[Treatment]) -> float:
        """The next step at which to look; infinite where no rate was chosen."""
        if self._chosen(treatments) is None:
            return math.inf
        return max(treatments[-1].step + 2 * WINDOW, self._looked_at + EVERY)

    def stands_still(self, treatments: Sequence[Treatment], run: RunState) -> Treatment | None:
        """What has chosen the rate at which the loss does not fall any more; None: it falls."""
        self._looked_at = run.step
        losses = [loss for _, loss in run.losses]
        newest, before = losses[-WINDOW:], losses[-2 * WINDOW : -WINDOW]
        first = statistics.median(losses[:20])
        if len(before) < WINDOW or not all(map(math.isfinite, newest + before)):
            return None
        now, earlier = statistics.fmean(newest), statistics.fmean(before)
        if not 0 < now < LEARNED * first:
            return None
        spread = statistics.pvariance(newest) + statistics.pvariance(before)
        falls = now < earlier - ERRORS * math.sqrt(spread / WINDOW)
        return None if falls else self._chosen(treatments)

    def _chosen(self, treatments: Iterable[Treatment]) -> Treatment | None:
        """The last rewind of a run that had no good rate of its own before.

        None where it was taken back since: the run has the script's own rate again.
        """
        kept = [t for t in treatments if t.remedy == "rewind" and t.ended.startswith("kept")]
        if not kept or kept[-1].receipt is None or kept[-1].step > START_STEPS:
            return None
        receipt = kept[-1].receipt
        return kept[-1] if receipt.in_force and receipt.details["factor"] < 1.0 else None
