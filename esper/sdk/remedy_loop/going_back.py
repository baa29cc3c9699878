"""The way back to where the first remedy was given, where none helped."""

from __future__ import annotations

import math
from typing import Any

from esper.contracts.remedies import MARKED
from esper.diagnosis import Diagnosed
from esper.diagnosis.base import RemedySlug
from esper.exceptions import EsperError
from esper.sdk.remedy_loop import losses
from esper.sdk.remedy_loop.approval import Approval
from esper.sdk.remedy_loop.history import Case, History
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery
from esper.sdk.treatments import Treatment

WORSE = 1.1  # times the loss at the first remedy: the noise of a median of so many losses
NEWEST_LOSSES = 3
_ENDED = "went back to where the first remedy was given, because none helped"
_TO_MARK: dict[str, Any] = {"step": MARKED, "factor": 1.0}  # with the script's own rate


class WayBack:
    """Ends the remedies of one run no worse than without them."""

    def __init__(
        self, run: RunState, surgery: Surgery, history: History, approval: Approval
    ) -> None:
        self._run = run
        self._surgery = surgery
        self._history = history
        self._approval = approval

    def mark(self, case: Case) -> None:
        """Where the first remedy of a fault is given: one state, of the newest of such faults."""
        # The loss may have just jumped.
        level = max(losses.level(self._run), losses.level(self._run, NEWEST_LOSSES))
        if not case.given and self._surgery.states is not None and math.isfinite(level):
            case.level = level
            self._surgery.states.mark(self._run.step)
            for other in self._history.cases.values():
                other.went_back |= other is not case

    def is_needed(self, found: Diagnosed) -> bool:
        """Its remedies did not help, and the run is worse than when the first one was given."""
        case = self._history.case_of(found.rule.slug)
        if (
            not self._approval.acts_by_rule
            # The held-out loss is what is wrong: its best weights are the way back, on request.
            or RemedySlug.RESTORE_BEST in found.rule.remedies
            or case.went_back
            or self._run.other_data  # so the losses of then are no measure
            or not case.given
            or not math.isfinite(case.level)
        ):
            return False
        return not losses.level(self._run) <= WORSE * abs(case.level)

    def go(self, found: Diagnosed) -> Treatment | None:
        """To the weights in which the first remedy was given; None: it is not possible."""
        slug = found.rule.slug
        case = self._history.case_of(slug)
        case.went_back = True
        reason = self._surgery.refusal("rewind", "", None, _TO_MARK)
        if not reason:
            try:
                for treatment in self._history.lowered_in_vain(slug):
                    assert treatment.receipt is not None
                    self._surgery.undo(treatment.receipt, hard=False)
                receipt = self._surgery.remedy("rewind", "", None, dict(_TO_MARK), slug)
                step, evidence = self._run.step, found.evidence
                return Treatment(slug, "rewind", step, receipt, evidence, ended=_ENDED)
            except EsperError as error:
                reason = str(error)
        case.refused["rewind"] = reason
        return None
