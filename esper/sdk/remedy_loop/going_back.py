"""The way back to where the first remedy was given, where the remedies have left the run worse."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

from esper.contracts.remedies import MARKED
from esper.diagnosis import Diagnosed
from esper.diagnosis.base import Evidence, RemedySlug
from esper.diagnosis.registry import get_rule
from esper.exceptions import EsperError
from esper.sdk.remedy_loop import losses
from esper.sdk.remedy_loop.approval import Approval
from esper.sdk.remedy_loop.history import Case, History
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery
from esper.sdk.treatments import Treatment

WORSE = 1.1  # times the loss at the first remedy: the noise of a median of so many losses
NEWEST_LOSSES = 3
COMPARED_STEPS = 120  # after the last remedy; more where it gave up more steps
_NONE_HELPED = "none helped"
_LEFT_WORSE = "the finding was over, and the loss higher than before"
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
        return self._may_go(found.rule.slug) and not losses.level(self._run) <= WORSE * abs(
            case.level
        )

    def go(self, found: Diagnosed) -> Treatment | None:
        """To the weights in which the first remedy was given; None: it is not possible."""
        return self._go(found.rule.slug, found.evidence, _NONE_HELPED)

    # -- where the finding is over -----------------------------------------------------------------

    @property
    def next_step(self) -> float:
        """The next step in which :meth:`look` has something to compare, while no finding ends."""
        if not self._approval.acts_by_rule:
            return math.inf
        due = map(self._due, self._history.cases.values())
        return min((step for step in due if step > self._run.step), default=math.inf)

    def look(self, open_: Container[str]) -> Treatment | None:
        """Goes back where a finding is over, and the run is worse than before its first remedy.

        Args:
            open_: the slugs of the findings that something may still be done about.
        """
        if self._history.running:
            return None
        for slug, case in self._history.cases.items():
            if slug in open_ or self._run.step < self._due(case):
                continue
            latest = self._history.treatments[-1]
            case.compared = latest.step
            if self._may_go(slug) and self._is_worse(slug):
                return self._go(slug, latest.evidence, _LEFT_WORSE)
        return None

    def _due(self, case: Case) -> float:
        """When to compare; infinite where nothing was done since the last time."""
        treatments = self._history.treatments
        if not treatments or case.went_back or not math.isfinite(case.level):
            return math.inf
        latest = treatments[-1]
        if latest.step <= case.compared:
            return math.inf
        details = latest.receipt.details if latest.receipt is not None else {}
        given_up = latest.step - int(details.get("to_step", latest.step))
        return latest.step + max(COMPARED_STEPS, given_up)

    def _is_worse(self, slug: str) -> bool:
        """The newest losses are above those from before its first remedy, by more than noise."""
        before, now = self._history.case_of(slug).level, losses.level(self._run)
        first = next(t.step for t in self._history.treatments if t.finding == slug)
        noise = losses.error(self._run, first)
        return not now <= max(WORSE * abs(before), before + losses.ERRORS * noise)

    # -- both --------------------------------------------------------------------------------------

    def _may_go(self, slug: str) -> bool:
        """Going back is known to be an answer, and was not tried."""
        case = self._history.case_of(slug)
        return bool(
            self._approval.acts_by_rule
            # The held-out loss is what is wrong: its best weights are the way back, on request.
            and RemedySlug.RESTORE_BEST not in get_rule(slug).remedies
            and not case.went_back
            and not self._run.other_data  # so the losses of then are no measure
            and case.given
            and math.isfinite(case.level)
        )

    def _go(self, slug: str, evidence: Evidence | None, reason: str) -> Treatment | None:
        case = self._history.case_of(slug)
        case.went_back = True
        refused = self._surgery.remedies.refusal("rewind", "", None, _TO_MARK)
        if not refused:
            try:
                for treatment in self._history.in_force(slug):
                    assert treatment.receipt is not None
                    self._surgery.undo(treatment.receipt, hard=False)
                receipt = self._surgery.remedies.apply("rewind", "", None, dict(_TO_MARK), slug)
                ended = f"went back to where the first remedy was given, because {reason}"
                return Treatment(slug, "rewind", self._run.step, receipt, evidence, ended=ended)
            except EsperError as error:
                refused = str(error)
        case.refused["rewind"] = refused
        return None
