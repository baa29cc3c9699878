"""Whether a remedy needs a person's approval, and who gives it."""

from __future__ import annotations

from dataclasses import replace

from esper.constraints import RemedyInputs, check_remedy
from esper.contracts import Risk, RunMode, risk_rank
from esper.remedies import Remedy
from esper.sdk.remedy_loop.history import History
from esper.sdk.run_state import RunState

LOCAL_MAX_RISK = Risk.MEDIUM  # each remedy of the catalogue can be undone to the bit
BUDGET, BUDGET_STEPS = 12, 10_000  # so many remedies by rule in so many steps of the run
CHANGES_OF_DATA = 2  # so many are no accident
_HARD = frozenset({"non_finite", "rate_jump"})  # faults whatever the data are
_OTHER_DATA = (
    "the data or the targets of this run change while it trains, so its losses do not tell a fault"
)
_OBSERVES = "the run only observes, so this is what Esper would do"
_ON_EACH_RANK = "on several ranks, call session.remedy with these settings on each of them"


class Approval:
    """Who decides about the remedies of one run.

    Args:
        alone: there are no other ranks.
        has_server: it asks people, and its commands apply remedies.
    """

    def __init__(self, run: RunState, history: History, *, alone: bool, has_server: bool) -> None:
        self._run = run
        self._history = history
        self._alone = alone
        self.has_server = has_server

    @property
    def observes(self) -> bool:
        return self._run.mode is RunMode.OBSERVE

    @property
    def applies_here(self) -> bool:
        """A remedy is applied here, on all ranks; otherwise the script must do it."""
        return self._alone or self.has_server

    @property
    def installs_nothing(self) -> bool:
        """Nothing is put into the model here, so nothing can be tried out in it."""
        return self.observes or not self.applies_here

    @property
    def given_here(self) -> bool:
        """Proposals can be approved here; otherwise they say what would be done."""
        return self._alone and not self.observes

    @property
    def acts_by_rule(self) -> bool:
        """There is nobody else who decides."""
        return self._run.mode is RunMode.AUTOMATIC and self._alone and not self.has_server

    @property
    def lacks_inputs(self) -> bool:
        """A batch of inputs, the same on all ranks, cannot be had here."""
        return self.applies_here and not self._alone

    def why_asked(self, remedy: Remedy, given: int, finding: str) -> str:
        """Why a person must decide; empty: it is applied by rule, or the server asks.

        Args:
            given: how often it was given for this kind of finding.
            finding: slug of its rule.
        """
        if self.observes:
            return _OBSERVES
        if not self.applies_here:
            return _ON_EACH_RANK
        if self.has_server:
            return ""
        if self._run.other_data >= CHANGES_OF_DATA and finding not in _HARD:
            return _OTHER_DATA
        return self._gates(remedy, given) or self._budget()

    def _budget(self) -> str:
        since = self._run.step - BUDGET_STEPS
        recent = [entry for entry in self._history.treatments if entry.step > since]
        if len(recent) >= BUDGET:
            return f"{len(recent)} remedies were applied in the last {BUDGET_STEPS:,} steps"
        return ""

    def _gates(self, remedy: Remedy, given: int) -> str:
        """What the server's gates ask for; empty: they ask for no person."""
        run = self._run
        inputs = RemedyInputs(
            mode=run.mode,
            step=run.step,
            remedy=remedy.slug,
            given=given,
            always_asks=remedy.asks,
            risk=remedy.risk,
            age_seconds=0.0,  # it was found in this step
        )
        # Nobody else watches a local run, so it may do more by rule than most servers allow.
        limit = max(run.policy.auto_max_risk, LOCAL_MAX_RISK, key=risk_rank)
        checks = check_remedy(inputs, replace(run.policy, auto_max_risk=limit))
        return next((check.text.rstrip(".") for check in checks if check.asks), "")
