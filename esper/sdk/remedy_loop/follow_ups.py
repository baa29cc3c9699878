"""Remedies that complete another one: the rate that it left is measured and made to fit."""

from __future__ import annotations

import math
from dataclasses import replace

from esper.diagnosis.base import Evidence
from esper.diagnosis.updates import MATCHED, follows_gradient
from esper.remedies.good_states import START_STEPS
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.remedy_loop.applying import Applier
from esper.sdk.remedy_loop.approval import Approval
from esper.sdk.remedy_loop.history import History
from esper.sdk.remedy_loop.settling import Settling
from esper.sdk.remedy_loop.verdicts import Verdicts
from esper.sdk.run_state import RunState
from esper.sdk.treatments import RemedyProposal

LARGEST_CORRECTION = 3.0  # of a rate that was lowered by one estimate
SETTLED = 0.5  # factor of the rate, where the loss stands still


class FollowUps:
    """Of the remedies of one run."""

    def __init__(
        self,
        run: RunState,
        diagnosis: DiagnosisWatch,
        history: History,
        approval: Approval,
        applier: Applier,
        verdicts: Verdicts,
    ) -> None:
        self._run = run
        self._diagnosis = diagnosis
        self._history = history
        self._approval = approval
        self._applier = applier
        self._verdicts = verdicts
        self._settling = Settling()

    @property
    def next_step(self) -> float:
        """The next step in which :meth:`settle` has something to look at."""
        if not self._approval.acts_by_rule:
            return math.inf
        return self._settling.next_step(self._history.treatments)

    def match_updates(self, cause: RemedyProposal) -> None:
        """The rate that was lowered on a guess is brought to where updates have a sound size."""
        lowered = cause.remedy == "rewind" and cause.config.get("factor", 1.0) != 1.0
        # Later, or where the rate jumped, the script's own rate has been a good one.
        if not lowered or self._run.step > START_STEPS or cause.evidence.signal == "learning_rate":
            return
        if not follows_gradient(self._diagnosis.optimizers):
            return
        config = {"share": MATCHED, "most": LARGEST_CORRECTION}
        self._applier.apply_also(replace(cause, remedy="match_updates", layer="", config=config))

    def settle(self) -> None:
        """The loss stands still at a rate that was chosen here, so it may be its noise."""
        if self._run.step < self.next_step:
            return
        chosen = self._settling.stands_still(self._history.treatments, self._run)
        if chosen is None:
            return
        evidence = chosen.evidence or Evidence("the loss stands still", "a falling loss", "loss")
        config = {"factor": SETTLED}
        proposal = RemedyProposal(
            chosen.finding, "set_lr", "", config, self._run.step, "", evidence
        )
        if (treatment := self._applier.apply_also(proposal)) is not None:
            reason = "the loss stood still at the rate that was chosen before"
            self._verdicts.keep(treatment, reason)
