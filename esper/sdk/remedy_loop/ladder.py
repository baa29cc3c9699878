"""Which remedy is tried first, and which after it."""

from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis import Diagnosed, RemedySlug
from esper.diagnosis.updates import estimates_rate, follows_gradient
from esper.remedies import list_remedies
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.remedy_loop import losses
from esper.sdk.remedy_loop.history import History
from esper.sdk.remedy_loop.verdicts import RAISES
from esper.sdk.remedy_loop.young_run import YoungRun
from esper.sdk.run_state import RunState

# The repair begins anew too, and a lower rate makes neither the data nor the weights right, nor
# their decay, nor a rate that has vanished.
_OF_THE_SCALE = frozenset(
    {
        "bad_initialisation", "repeated_initialisation", "abnormal_data", "weight_decay_high",
        "rate_vanished",
    }
)  # fmt: skip
_OF_THE_SCRIPT = frozenset({RemedySlug.TELL, RemedySlug.THAW, RemedySlug.ADOPT})


class Ladder:
    """The order of the remedies for the findings of one run."""

    def __init__(
        self, run: RunState, diagnosis: DiagnosisWatch, history: History, young: YoungRun
    ) -> None:
        self._run = run
        self._diagnosis = diagnosis
        self._history = history
        self._young = young

    def order(self, found: Diagnosed) -> list[str]:
        """The remedies of the rule, in the order of the rule, except for a run that has just begun.

        What is wrong from the start lies in the initial weights, or in the first updates, which
        cost nothing to take back.
        """
        order, young = self._of_rule(found), self._young
        if found.rule.by_ledger or not set(order) - _OF_THE_SCRIPT:
            # What the optimizer holds, what is frozen, or how the script is written, such as one
            # layer in several places, is no matter of weights or rates.
            return order
        goes_back = "rewind" in order
        if young.began_anew_in_vain or (goes_back and young.started_badly):
            # The first weights are at fault: they were found to be, or a lower rate from the same
            # ones did not help.
            return ["repair_scale", *(slug for slug in order if slug != "repair_scale")]
        hurt = young.was_hurt or young.lost_units(found)
        if hurt and found.rule.slug not in _OF_THE_SCALE:
            # Whatever has come of it, the first updates were too large.
            return ["rewind", *(slug for slug in order if slug != "rewind")]
        if young.is_early:
            # An update did it, or the initialisation.
            by_update = found.rule.slug == "dying_relu" or losses.have_grown(self._run)
            first = "rewind" if by_update else "repair_scale"
            order.sort(key=lambda slug: slug != first)
        elif found.severity is Severity.CRITICAL and self._history.case_of(found.rule.slug).given:
            order.sort(key=lambda slug: slug != "rewind")  # the first remedy left it critical
        return order

    def _of_rule(self, found: Diagnosed) -> list[str]:
        """The remedies that the rule names and the catalogue has."""
        known = {remedy.slug for remedy in list_remedies()}
        order = [str(remedy) for remedy in found.remedies if str(remedy) in known]
        if not follows_gradient(self._diagnosis.optimizers):
            # One measured update says enough: a later one is smaller, as its gradients are noise.
            order = [slug for slug in order if slug != "match_updates"]
        if found.rule.slug in RAISES and estimates_rate(self._diagnosis.optimizers):
            # What is low is the estimate; a higher factor would multiply it once it has grown.
            order = [slug for slug in order if slug != "set_lr"]
        if self._young.has_learned and found.severity is not Severity.CRITICAL:
            # New scales take back what was learned.
            order = [slug for slug in order if slug != "repair_scale"]
        if found.rule.slug == "dying_relu" and not self._going_back_answers(found):
            order.sort(key=lambda slug: slug == "rewind")
            if self._young.guesses:
                # Units that are recycled have dead ones behind them.
                order.sort(key=lambda slug: slug != "repair_scale")
        return order

    def _going_back_answers(self, found: Diagnosed) -> bool:
        """A sudden death, or one of a run that has nothing to lose.

        Recycled units of a run that never learned have dead ones behind them, and die again: the
        same first weights with other batches and smaller updates mostly learn.
        """
        return self._young.loses_nothing or losses.jumped(self._run, found.since_step)
