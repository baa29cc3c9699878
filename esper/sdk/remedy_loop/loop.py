"""What is done about the findings of one run in a step; see the package's docstring."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable

from torch import nn

from esper.contracts import Severity
from esper.diagnosis import Diagnosed, title_of
from esper.exceptions import ConfigurationError, EsperError
from esper.grafting import RemedyReceipt
from esper.sdk.announcing import Announcer
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.proposing import RemedyProposer
from esper.sdk.remedy_loop.applying import Applier
from esper.sdk.remedy_loop.approval import Approval
from esper.sdk.remedy_loop.choosing import Chooser
from esper.sdk.remedy_loop.doses import Doses
from esper.sdk.remedy_loop.follow_ups import FollowUps
from esper.sdk.remedy_loop.going_back import WayBack
from esper.sdk.remedy_loop.history import EARLY_STEPS, Case, History
from esper.sdk.remedy_loop.input_sample import InputSample
from esper.sdk.remedy_loop.ladder import Ladder
from esper.sdk.remedy_loop.other_data import OtherData
from esper.sdk.remedy_loop.server import ServerSide
from esper.sdk.remedy_loop.verdicts import Verdicts
from esper.sdk.remedy_loop.young_run import YoungRun
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery
from esper.sdk.treatments import RemedyProposal, Treatment

logger = logging.getLogger("esper")

AFTER_GUARD_STEPS = 5  # in which the loss can come back
PASSING_STEPS = 10  # in which what has done no harm may pass, such as batches that a script skips


class RemedyLoop:
    """Answers the open findings of one run.

    Args:
        diagnosis: its open findings are answered.
        alone: there are no other ranks.
        proposer: to the server; None in local mode.

    Attributes:
        history: what was proposed and done.
        server: its side of the remedies.
    """

    def __init__(
        self,
        model: nn.Module,
        surgery: Surgery,
        run: RunState,
        diagnosis: DiagnosisWatch,
        announcer: Announcer,
        *,
        alone: bool = True,
        proposer: RemedyProposer | None = None,
    ) -> None:
        self._surgery = surgery
        self._run = run
        self._diagnosis = diagnosis
        self._announcer = announcer
        self._sample = sample = InputSample(model)
        self.history = history = History()
        self._approval = approval = Approval(
            run, history, alone=alone, has_server=proposer is not None
        )
        young = YoungRun(run, diagnosis, history)
        ladder = Ladder(run, diagnosis, history, young)
        doses = Doses(run, diagnosis, surgery, young)
        self._chooser = Chooser(run, surgery, history, ladder, doses, approval, sample)
        self.way_back = WayBack(run, surgery, history, approval)
        self._applier = Applier(run, surgery, diagnosis, history, approval, self.way_back, sample)
        self._verdicts = Verdicts(run, surgery, history, announcer, proposer)
        self._other_data = OtherData(run, surgery, diagnosis, history, announcer, proposer)
        self._follow_ups = FollowUps(
            run, diagnosis, history, approval, self._applier, self._verdicts
        )
        self.server = ServerSide(
            run,
            surgery,
            diagnosis,
            announcer,
            history,
            self._applier,
            sample,
            proposer,
            alone=alone,
        )

    @property
    def proposals(self) -> list[RemedyProposal]:
        """They wait for a person, or say what Esper would do."""
        return self.history.proposals

    @property
    def treatments(self) -> list[Treatment]:
        """Every remedy that was applied for a finding, oldest first."""
        return self.history.treatments

    def on_step(self, guard_acted_at: int = -1) -> None:
        """A step of the session is over.

        Args:
            guard_acted_at: when the guard took a graft out: that answers what it has seen.
        """
        open_ = {found.rule.slug: found for found in self._diagnosis.diagnosis.open}
        self._other_data.look()
        self._verdicts.judge(open_)
        answered = {s for s, found in open_.items() if found.severity is not Severity.INFO}
        self._note_way_back(self.way_back.look(answered))
        self._follow_ups.settle()
        for entry in [entry for entry in self.proposals if entry.finding not in open_]:
            self.server.forget(entry)
        self.server.take_answers()
        if guard_acted_at >= 0 and self._run.step < guard_acted_at + AFTER_GUARD_STEPS:
            return
        running = self.history.running
        for found in _worst_first(open_.values()):
            if self._may_answer(found, running) and self._answer(found):
                return

    @property
    def idle_until(self) -> float:
        """The next step for which :meth:`on_step` must be called, while no finding changes."""
        history, step = self.history, self._run.step
        if self._sample.is_awaited or history.running:
            return 0
        slugs = {found.rule.slug for found in self._diagnosis.diagnosis.open}
        open_ = {slug for slug in slugs if not history.is_proposed(slug)}
        pauses = (history.cases[slug].not_before for slug in open_ if slug in history.cases)
        known: list[float] = [*pauses, history.latest_change + EARLY_STEPS] if open_ else []
        due = min(self._follow_ups.next_step, self.way_back.next_step)
        known.append(max(due, step + 1))
        return min((later for later in known if later > step), default=math.inf)

    # -- people --------------------------------------------------------------------------------

    def approve(self, proposal: RemedyProposal) -> RemedyReceipt:
        """A person approved.

        Raises:
            ValueError: it is not waiting any more.
            ConfigurationError, GraftError: it could not be applied; the model is as before.
        """
        if self._approval.has_server:
            raise ConfigurationError("with a server, remedies are approved there")
        if proposal not in self.proposals:
            raise ValueError("this remedy is not waiting any more")
        self.history.drop(proposal)
        open_ = [f for f in self._diagnosis.diagnosis.open if f.rule.slug in proposal.findings]
        urgent = any(found.severity is Severity.CRITICAL for found in open_)
        receipt = self._applier.apply(proposal, urgent=urgent).receipt
        assert receipt is not None
        return receipt

    def reject(self, proposal: RemedyProposal) -> None:
        """A person rejected: this remedy is not proposed for this kind of finding again.

        Raises:
            ConfigurationError: with a server, which the person has to tell.
        """
        if self._approval.has_server:
            raise ConfigurationError("with a server, remedies are rejected there")
        self.history.drop(proposal)
        for slug in proposal.findings:
            self.history.case_of(slug).rejected.add(proposal.remedy)

    @property
    def waits(self) -> bool:
        """Its proposals can be approved here; otherwise they say what would be done."""
        return self._approval.given_here

    def reasons(self) -> list[str]:
        """A sentence for each remedy that is being tried, and for each that was not applied."""
        open_ = {found.rule.slug for found in self._diagnosis.diagnosis.open}
        tried = [
            f"{t.receipt} was applied at step {t.step:,}{_because(t.finding)}, and is being tried."
            for t in self.history.running
        ]
        refused = [
            f"{remedy} cannot answer {title_of(finding)}: {reason.rstrip('.')}."
            for finding, case in self.history.cases.items()
            for remedy, reason in case.refused.items()
            if finding in open_
        ]
        return tried + refused

    def close(self) -> None:
        self._sample.forget()

    # -- one finding ---------------------------------------------------------------------------

    def _may_answer(self, found: Diagnosed, running: Iterable[Treatment]) -> bool:
        """One remedy at a time, so that it is known what helped; a critical finding cannot wait."""
        if found.severity is Severity.INFO or found.evidence.passes:
            return False
        if found.evidence.may_pass and self._run.step < found.since_step + PASSING_STEPS:
            return False
        urgent = found.severity is Severity.CRITICAL
        if any(t.finding == found.rule.slug or not urgent or t.urgent for t in running):
            return False
        return urgent or not self._is_from_before(found)

    def _is_from_before(self, found: Diagnosed) -> bool:
        """Weights were put in since it was found, and it has not had the time to resolve."""
        latest = self.history.latest_change
        return found.opened_step <= latest and self._run.step < latest + EARLY_STEPS

    def _answer(self, found: Diagnosed) -> bool:
        """True where a remedy was applied, or will be in the next step."""
        case = self.history.case_of(found.rule.slug)
        if self.history.is_proposed(found.rule.slug) or self._pauses(case):
            return False
        if self._run.step < found.opened_step + self._other_data.patience(case):
            return False
        proposal = self._chooser.next(found)
        if proposal is None:
            # The remedy of a worse finding comes first, once it has its sample.
            return self._sample.is_awaited or self._goes_back(found)
        if self._approval.has_server and not self._approval.observes:
            if not self.history.answers_also(proposal):
                self.server.propose(found, proposal)
            return False
        if proposal.asks:
            self._ask(found, proposal)
            return False
        return self._apply(found, case, proposal)

    def _pauses(self, case: Case) -> bool:
        return self._run.step < case.not_before or time.monotonic() < case.not_before_time

    def _ask(self, found: Diagnosed, proposal: RemedyProposal) -> None:
        self._goes_back(found)  # a person may be away
        if self.history.answers_also(proposal):
            return
        self.history.proposals.append(proposal)
        self._announcer.remedy_proposed(str(proposal), waits=not self._approval.observes)

    def _apply(self, found: Diagnosed, case: Case, proposal: RemedyProposal) -> bool:
        try:
            self._applier.apply(proposal, urgent=found.severity is Severity.CRITICAL)
        except EsperError as error:
            case.refused[proposal.remedy] = str(error)
            case.failed.add(proposal.remedy)
            logger.warning("step %d: %s was not applied: %s", self._run.step, proposal, error)
            return False
        self._follow_ups.match_updates(proposal)
        return True

    def _goes_back(self, found: Diagnosed) -> bool:
        """Where no remedy helped, and the run is worse than when the first one was given."""
        if not self.way_back.is_needed(found):
            return False
        self._note_way_back(self.way_back.go(found))
        return True

    def _note_way_back(self, treatment: Treatment | None) -> None:
        if treatment is not None:
            self._applier.note(treatment)
            self._announcer.remedy_judged(treatment.remedy, treatment.ended)


def _worst_first(found: Iterable[Diagnosed]) -> list[Diagnosed]:
    return sorted(found, key=lambda f: (f.severity is not Severity.CRITICAL, f.since_step))


def _because(finding: str) -> str:
    """Empty where a person has asked for it."""
    return f" because of {title_of(finding)}" if finding else ""
