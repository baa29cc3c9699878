"""The next remedy for a finding."""

from __future__ import annotations

from esper.diagnosis import Diagnosed
from esper.remedies import Remedy, get_remedy
from esper.sdk.remedy_loop.approval import Approval
from esper.sdk.remedy_loop.doses import Doses
from esper.sdk.remedy_loop.history import History
from esper.sdk.remedy_loop.input_sample import InputSample
from esper.sdk.remedy_loop.ladder import Ladder
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery
from esper.sdk.treatments import RemedyProposal


class Chooser:
    """Chooses the remedies of one run."""

    def __init__(
        self,
        run: RunState,
        surgery: Surgery,
        history: History,
        ladder: Ladder,
        doses: Doses,
        approval: Approval,
        sample: InputSample,
    ) -> None:
        self._run = run
        self._surgery = surgery
        self._history = history
        self._ladder = ladder
        self._doses = doses
        self._approval = approval
        self._sample = sample

    def next(self, found: Diagnosed) -> RemedyProposal | None:
        """The first remedy of the finding's rule that fits here.

        None: there is none, or it is known once the sample of inputs that is awaited has come.
        """
        case = self._history.case_of(found.rule.slug)
        for slug in self._ladder.order(found):
            if slug in case.rejected | case.failed:
                continue
            remedy = get_remedy(slug)
            proposal = self._proposal(remedy, found, case.given.get(slug, 0))
            if self._waits_for_sample(remedy):
                return None
            if reason := self._refusal(remedy, proposal):
                case.refused[slug] = reason
                continue
            return proposal
        return None

    def _proposal(self, remedy: Remedy, found: Diagnosed, given: int) -> RemedyProposal:
        return RemedyProposal(
            found.rule.slug,
            remedy.slug,
            found.evidence.began_at if remedy.scope == "layer" else "",
            self._doses.of(remedy.slug, found, given - self._stronger_already(remedy, found)),
            self._run.step,
            self._approval.why_asked(remedy, given, found.rule.slug),
            found.evidence,
        )

    def _stronger_already(self, remedy: Remedy, found: Diagnosed) -> int:
        """Doses of it that are in force, which the next one adds to."""
        lowered = self._history.lowered_in_vain(found.rule.slug)
        return sum(treatment.remedy == remedy.slug for treatment in lowered)

    def _waits_for_sample(self, remedy: Remedy) -> bool:
        approval = self._approval
        if not remedy.needs_sample or approval.lacks_inputs or approval.installs_nothing:
            return False
        return not self._sample.ready()

    def _refusal(self, remedy: Remedy, proposal: RemedyProposal) -> str:
        """Why it does not fit here; empty: it does, or nobody can tell."""
        if remedy.needs_sample and self._approval.lacks_inputs:
            return "it needs a batch of inputs, the same on all ranks"
        if self._approval.installs_nothing:
            return ""
        return self._surgery.remedies.refusal(
            remedy.slug, proposal.layer, self._sample.batch, proposal.config
        )
