"""Whether a remedy is kept or ended: after its window, by its finding."""

from __future__ import annotations

import logging

from esper.contracts import Severity, Signal
from esper.diagnosis import Diagnosed, title_of
from esper.exceptions import EsperError
from esper.remedies import get_remedy
from esper.sdk.announcing import Announcer
from esper.sdk.proposing import RemedyProposer
from esper.sdk.remedy_loop import losses
from esper.sdk.remedy_loop.history import EARLY_STEPS, IN_VAIN, History
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery
from esper.sdk.treatments import Treatment

logger = logging.getLogger("esper")

WINDOW_STEPS, URGENT_WINDOW_STEPS = 120, 20  # for so long a remedy is given time
UNMEASURED_WINDOWS = 20  # how much longer, while nothing new was measured
KEPT_AFTER_STEPS = 10  # the finding must be over for so long
# Rules that are answered by a higher rate; one that is too high does harm.
RAISES = frozenset(
    {"update_ratio_low", "clipped_to_nothing", "slow_convergence", "vanishing_gradient"}
)
_AGAIN = frozenset({"rewind", "set_lr"})  # have a stronger dose
_OF_THE_RATE = frozenset({"match_updates", "set_lr"})
_READ = frozenset({"grad", "grad_norm", str(Signal.UPDATE_RATIO)})  # in each planned step


class Verdicts:
    """Judges the remedies of one run.

    Args:
        proposer: tells the server; None in local mode.
    """

    def __init__(
        self,
        run: RunState,
        surgery: Surgery,
        history: History,
        announcer: Announcer,
        proposer: RemedyProposer | None,
    ) -> None:
        self._run = run
        self._surgery = surgery
        self._history = history
        self._announcer = announcer
        self._proposer = proposer

    def judge(self, open_: dict[str, Diagnosed]) -> None:
        """Ends windows that are over.

        Args:
            open_: the open findings by the slugs of their rules.
        """
        for treatment in self._history.running:
            if self._was_taken_back(treatment):
                treatment.ended = "taken back"
            elif not treatment.finding:
                self._judge_asked_for(treatment, open_)
            else:
                self._judge_by_finding(treatment, open_)

    def keep(self, treatment: Treatment, reason: str) -> None:
        """It stays in force."""
        treatment.ended = f"kept, because {reason}"
        self._announcer.remedy_judged(treatment.remedy, treatment.ended)
        self._report(treatment, reason, keep=True)

    def _judge_by_finding(self, treatment: Treatment, open_: dict[str, Diagnosed]) -> None:
        found = open_.get(treatment.finding)
        if treatment.finding in RAISES and (new := _critical_since(treatment, open_)):
            return self._fail(treatment, f"{' and '.join(new)} came after it", hard=True)
        age = self._run.step - treatment.step
        if found is None or found.severity is Severity.INFO:  # a note, which nothing answers
            if age >= KEPT_AFTER_STEPS:
                self.keep(treatment, f"{title_of(treatment.finding)} is over")
        elif age >= self._window(treatment, found) and not self._lets_it_learn(treatment):
            self._fail(treatment, f"{title_of(treatment.finding)} is still open")
        return None

    def _lets_it_learn(self, treatment: Treatment) -> bool:
        """The loss falls at the higher rate; the finding, which looks far back, ends later."""
        raised = treatment.finding in RAISES and treatment.remedy in _OF_THE_RATE
        return raised and losses.fell_since(self._run, treatment.step)

    def _judge_asked_for(self, treatment: Treatment, open_: dict[str, Diagnosed]) -> None:
        """A person's own remedy has no finding: it must not be followed by one."""
        if treatment.receipt is not None and treatment.receipt.changed_nothing:
            return self.keep(treatment, "it changes nothing")
        serious = (Severity.SERIOUS, Severity.CRITICAL)
        new = [
            found.rule.title
            for found in open_.values()
            if found.severity in serious and found.since_step > treatment.step
        ]
        if new:
            self._fail(treatment, f"{' and '.join(new)} came after it")
        elif self._run.step - treatment.step >= WINDOW_STEPS:
            self.keep(treatment, f"nothing new was found in {WINDOW_STEPS} steps")

    def _was_taken_back(self, treatment: Treatment) -> bool:
        """By the server, the script or with an older change."""
        receipt = treatment.receipt
        if not treatment.adaptation or receipt is None or receipt.changed_nothing:
            return False
        return receipt not in self._surgery.changes.remedies

    def _window(self, treatment: Treatment, found: Diagnosed) -> int:
        """In steps. Longer while nothing new was measured, which says nothing of the remedy."""
        if treatment.urgent:
            return max(URGENT_WINDOW_STEPS, min(WINDOW_STEPS, _to_learn_again(treatment)))
        # A run that has just begun is looked at closely, and has no steps to lose.
        window = min(WINDOW_STEPS, max(EARLY_STEPS, treatment.step))
        unmeasured = found.evidence == treatment.evidence and found.evidence.signal not in _READ
        return window * (UNMEASURED_WINDOWS if unmeasured else 1)

    def _fail(self, treatment: Treatment, reason: str, *, hard: bool = False) -> None:
        """It did not help: what it does in each step ends; what it did once is history.

        A rate at which updates were far too large stays lowered: the next remedy would fail at it.

        Args:
            hard: it did harm, so the run goes back to the state before it.
        """
        treatment.ended = f"{IN_VAIN}, because {reason}"
        self._announcer.remedy_judged(treatment.remedy, treatment.ended)
        case = self._history.case_of(treatment.finding)
        if treatment.remedy not in _AGAIN:
            case.failed.add(treatment.remedy)
        case.not_before = self._run.step + (0 if treatment.urgent else case.pause)
        case.pause *= 2
        if treatment.adaptation:
            self._report(treatment, reason, keep=False, hard=hard)
            return  # the server commands its end
        self._end(treatment, hard=hard)

    def _end(self, treatment: Treatment, *, hard: bool) -> None:
        receipt = treatment.receipt
        if hard and receipt is not None and receipt in self._surgery.changes.remedies:
            try:
                self._surgery.undo(receipt, hard=True)
            except EsperError as error:
                logger.warning("step %d: %s stays: %s", self._run.step, receipt, error)
            else:
                return
        if receipt is None or not receipt.in_force:
            return
        # What stays of a new start fits its weights, and ends with them alone.
        if treatment.measured or get_remedy(treatment.remedy).begins_anew:
            return
        if receipt in self._surgery.changes.remedies:
            self._surgery.undo(receipt, hard=False)

    def _report(self, treatment: Treatment, reason: str, *, keep: bool, hard: bool = False) -> None:
        if treatment.adaptation and self._proposer is not None:
            self._proposer.judge(
                treatment.adaptation,
                keep=keep,
                reason=reason,
                step=self._run.step,
                steps=max(0, self._run.step - treatment.step),
                hard=hard,
            )


def _critical_since(treatment: Treatment, open_: dict[str, Diagnosed]) -> list[str]:
    """Titles of critical findings that began after it, in quotes."""
    found = (entry for entry in open_.values() if entry.severity is Severity.CRITICAL)
    return [title_of(entry.rule.slug) for entry in found if entry.since_step > treatment.step]


def _to_learn_again(treatment: Treatment) -> int:
    """The steps that a rewind gave up, where the loss must fall again; not for a NaN."""
    details = treatment.receipt.details if treatment.receipt is not None else {}
    if treatment.finding == "non_finite" or not details.get("to_step"):
        return 0
    return treatment.step - int(details["to_step"])
