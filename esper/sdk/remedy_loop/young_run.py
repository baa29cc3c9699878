"""What is wrong from the start lies in the initial weights, or in the first updates."""

from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis import Diagnosed
from esper.diagnosis.updates import EXCESSIVE
from esper.remedies.good_states import START_STEPS
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.remedy_loop import losses
from esper.sdk.remedy_loop.history import EARLY_STEPS, IN_VAIN, History
from esper.sdk.remedy_loop.verdicts import WINDOW_STEPS
from esper.sdk.run_state import RunState

_PASSES_NOTHING_ON = frozenset({"saturation", "vanishing_gradient"})


class YoungRun:
    """What is known of the start of one run."""

    def __init__(self, run: RunState, diagnosis: DiagnosisWatch, history: History) -> None:
        self._run = run
        self._diagnosis = diagnosis
        self._history = history

    @property
    def _has_fallen(self) -> bool:
        return losses.have_fallen(self._run, self._diagnosis.guessing_loss)

    @property
    def is_early(self) -> bool:
        """The run has so few steps, and has learned so little, that to begin anew costs little."""
        return self._run.step <= EARLY_STEPS and not self._has_fallen

    @property
    def was_hurt(self) -> bool:
        """One of the first updates, which can still be taken back, moved the weights far.

        Where the run has learned since, it did no harm, and to begin anew would throw that away,
        unless all of it is lost again.
        """
        young = self._run.step <= START_STEPS
        hurt = young and self._diagnosis.update_excess > EXCESSIVE
        return hurt and (self.guesses or not self._has_fallen)

    def lost_units(self, found: Diagnosed) -> bool:
        """Its first updates, which were far too large, switched off the units of a layer.

        A lower rate alone brings none of them back.
        """
        if self._run.step > START_STEPS or not self._diagnosis.update_excess > EXCESSIVE:
            return False
        if found.rule.slug in _PASSES_NOTHING_ON:
            # The repair, which comes otherwise, gives up as much, and leaves the rate as it is.
            return not self.has_learned
        learned_little = losses.level(self._run) >= losses.LEARNED * self._diagnosis.guessing_loss
        return found.rule.slug == "dying_relu" and learned_little

    @property
    def loses_nothing(self) -> bool:
        """It has learned nothing, so to begin anew takes nothing back that is worth keeping."""
        young = self._run.step <= START_STEPS
        return young and losses.never_fell(
            self._run, self._history.latest_change, self._diagnosis.guessing_loss
        )

    @property
    def has_learned(self) -> bool:
        """Since its weights were changed the last time, so there is something to lose."""
        return losses.fell(self._run, self._history.latest_change, self._diagnosis.guessing_loss)

    @property
    def guesses(self) -> bool:
        """The loss is that of equal chances, or higher: new weights take nothing back."""
        return losses.level(self._run) >= losses.UNLEARNED * self._diagnosis.guessing_loss

    @property
    def started_badly(self) -> bool:
        """The first weights are at fault, and not repaired yet."""
        if not self.is_early or self._history.case_of("bad_initialisation").given:
            return False
        return any(
            found.rule.slug == "bad_initialisation" and found.severity is not Severity.INFO
            for found in self._diagnosis.diagnosis.open
        )

    @property
    def began_anew_in_vain(self) -> bool:
        """The last remedy that has ended went back to the first weights, and did not help."""
        treatments = self._history.treatments
        ended = [entry for entry in treatments if entry.ended and entry.receipt is not None]
        if not ended or self._run.step > START_STEPS + WINDOW_STEPS:
            return False
        last = ended[-1]
        assert last.receipt is not None
        in_vain = last.remedy == "rewind" and last.ended.startswith(IN_VAIN)
        return in_vain and last.receipt.details.get("to_step") == 0
