"""What the first losses after a rewind show: the weights were at fault, or the data.

Weights that had a low loss, and have a high one on the batches of now, are as good as they were:
the data or the targets are others, as in the next task of a curriculum, after new labels, or for a
network that learns from another one. Then the rewind is undone to the bit, and the new level of
the loss is taken for the usual one.
"""

from __future__ import annotations

import math
import statistics

from esper.exceptions import EsperError
from esper.remedies import get_remedy
from esper.sdk.announcing import Announcer
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.proposing import RemedyProposer
from esper.sdk.remedy_loop.history import IN_VAIN, Case, History
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery
from esper.sdk.treatments import Treatment

FIRST_LOSSES = 3  # after the rewind; that of the first step is of the earlier weights alone
LEVEL_LOSSES, FEWEST_LOSSES = 20, 3  # up to the state that was restored
BAD_LOSSES = 5  # up to the rewind
PATIENCE = 20  # steps
RISE = 1.5  # of the loss from the one to the other, at least; a smaller one is no jump


class OtherData:
    """Looks at the rewinds of one run.

    Args:
        proposer: tells the server, whose command undoes its rewinds; None in local mode.
    """

    def __init__(
        self,
        run: RunState,
        surgery: Surgery,
        diagnosis: DiagnosisWatch,
        history: History,
        announcer: Announcer,
        proposer: RemedyProposer | None,
    ) -> None:
        self._run = run
        self._surgery = surgery
        self._diagnosis = diagnosis
        self._history = history
        self._announcer = announcer
        self._proposer = proposer

    def look(self) -> None:
        """A step of the session is over."""
        for treatment in self._history.running:
            if treatment.remedy == "rewind" and treatment.finding and not treatment.was_compared:
                reason = self._reason(treatment)
                if reason:
                    self._undo(treatment, reason)

    def patience(self, case: Case) -> int:
        """For so many steps a finding of this kind may pass by itself, as one before it did."""
        return PATIENCE if case.came_of_data else 0

    def _reason(self, treatment: Treatment) -> str:
        """Why the data must be others; empty: they need not be, or it is not known yet."""
        if treatment.receipt is None:
            return ""
        restored = int(treatment.receipt.details.get("to_step", -1))
        losses = list(self._run.losses)
        first = [loss for step, loss in losses if step > treatment.step][:FIRST_LOSSES]
        if len(first) < FIRST_LOSSES:
            return ""
        treatment.was_compared = True
        good = [
            loss
            for step, loss in losses
            if step <= restored and self._run.led_to_its_weights(step) and math.isfinite(loss)
        ][-LEVEL_LOSSES:]
        bad = [loss for step, loss in losses if restored < step <= treatment.step][-BAD_LOSSES:]
        if len(good) < FEWEST_LOSSES or not bad:
            return ""
        low, high = statistics.median(good), statistics.median(bad)
        middle = (low + high) / 2
        if not low + (RISE - 1.0) * abs(low) < high < math.inf or not min(first) > middle:
            return ""
        return (
            f"with the weights of step {restored:,} the loss is {statistics.median(first):.4g}, "
            f"and it was {low:.4g} then: the data or the targets have changed since"
        )

    def _undo(self, treatment: Treatment, reason: str) -> None:
        treatment.ended = f"{IN_VAIN}, because {reason}"
        self._announcer.remedy_judged(treatment.remedy, treatment.ended)
        case = self._history.case_of(treatment.finding)
        case.given[treatment.remedy] -= 1  # the next one need not be stronger
        case.came_of_data = True
        case.not_before = self._run.step + case.pause
        case.pause *= 2
        self._run.other_data_since = treatment.step
        self._run.other_data += 1
        if treatment.adaptation:
            if self._proposer is not None:
                self._proposer.judge(
                    treatment.adaptation,
                    keep=False,
                    reason=reason,
                    step=self._run.step,
                    steps=self._run.step - treatment.step,
                    hard=True,
                )
            return
        self._take_back(treatment, hard=True)
        for other in self._history.treatments:
            if other.finding == treatment.finding and not other.adaptation:
                self._take_back(other, hard=False)  # such as a clip, which slows the learning
        for entry in self._history.running:
            if not entry.adaptation and entry.receipt not in self._surgery.changes.remedies:
                entry.ended = "taken back with it"
        self._diagnosis.follow(get_remedy(treatment.remedy))

    def _take_back(self, treatment: Treatment, *, hard: bool) -> None:
        receipt = treatment.receipt
        if receipt not in self._surgery.changes.remedies or not (hard or receipt.in_force):
            return
        try:
            self._surgery.undo(receipt, hard=hard)
        except EsperError:
            if hard:  # the model was changed since
                self._take_back(treatment, hard=False)
