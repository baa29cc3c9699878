"""Applies remedies to the run."""

from __future__ import annotations

import logging

from esper.diagnosis.updates import EXCESSIVE
from esper.exceptions import EsperError
from esper.remedies import get_remedy
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.remedy_loop.approval import Approval
from esper.sdk.remedy_loop.going_back import WayBack
from esper.sdk.remedy_loop.history import History
from esper.sdk.remedy_loop.input_sample import InputSample
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery
from esper.sdk.treatments import RemedyProposal, Treatment

logger = logging.getLogger("esper")

_RATE = frozenset({"rewind", "set_lr"})  # lower it


class Applier:
    """Applies the remedies of one run, and tells the diagnosis."""

    def __init__(
        self,
        run: RunState,
        surgery: Surgery,
        diagnosis: DiagnosisWatch,
        history: History,
        approval: Approval,
        way_back: WayBack,
        sample: InputSample,
    ) -> None:
        self._run = run
        self._surgery = surgery
        self._diagnosis = diagnosis
        self._history = history
        self._approval = approval
        self._way_back = way_back
        self._sample = sample

    def apply(self, proposal: RemedyProposal, *, urgent: bool = False) -> Treatment:
        """Applies what was proposed.

        Raises:
            EsperError: it could not be applied; the model is as before.
        """
        self._way_back.mark(self._history.case_of(proposal.finding))
        measured = proposal.remedy in _RATE and self._diagnosis.update_excess > EXCESSIVE
        receipt = self._surgery.remedies.apply(
            proposal.remedy,
            proposal.layer,
            self._sample.batch,
            proposal.config,
            proposal.finding,
        )
        return self.note(
            Treatment(
                proposal.finding,
                proposal.remedy,
                self._run.step,
                receipt,
                proposal.evidence,
                urgent,
                measured=measured,
            )
        )

    def apply_also(self, proposal: RemedyProposal) -> Treatment | None:
        """A low-risk remedy beside another one; None where it does not fit, or a person decides."""
        remedy, case = get_remedy(proposal.remedy), self._history.case_of(proposal.finding)
        given = case.given.get(remedy.slug, 0)
        asked = self._approval.why_asked(remedy, given, proposal.finding)
        if remedy.slug in case.rejected | case.failed or asked:
            return None
        if self._surgery.remedies.refusal(remedy.slug, "", None, proposal.config):
            return None
        try:
            return self.apply(proposal)
        except EsperError as error:
            logger.warning("step %d: %s was not applied: %s", self._run.step, proposal, error)
            return None

    def note(self, treatment: Treatment) -> Treatment:
        """A remedy was applied: what was measured before says nothing about the run now."""
        self._sample.forget()
        self._diagnosis.follow(get_remedy(treatment.remedy))
        self._history.note(treatment)
        return treatment
