"""How much of a remedy is given: its settings for one finding."""

from __future__ import annotations

import math
from typing import Any

from esper.contracts import Signal
from esper.diagnosis import Diagnosed
from esper.diagnosis.updates import FIRST_OF_ADAPTIVE, MATCHED, STEADY, follows_gradient
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.remedy_loop import losses
from esper.sdk.remedy_loop.verdicts import RAISES
from esper.sdk.remedy_loop.young_run import YoungRun
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery

LARGEST_RISE = 1e5  # of a rate, in stages
WEAKEST, STRONGEST = 0.1, 1e-4  # factors of the learning rate
GENTLE = 0.5  # of a rate that may have been a little too high
JUMPED = "learning_rate"  # signal of the evidence that names the rate before and after


class Doses:
    """The settings of the remedies for the findings of one run."""

    def __init__(
        self, run: RunState, diagnosis: DiagnosisWatch, surgery: Surgery, young: YoungRun
    ) -> None:
        self._run = run
        self._diagnosis = diagnosis
        self._surgery = surgery
        self._young = young

    def of(self, slug: str, found: Diagnosed, given: int) -> dict[str, Any]:
        """The settings for this finding; stronger the second time: the first did not last."""
        if slug == "set_lr":
            return {"factor": self._rate(found, given)}
        if slug == "hold_lr":
            return {"value": found.evidence.value}  # the rate that the script began with
        if slug == "rewind":
            return self._rewind(found, given)
        if slug == "weight_decay":
            return self._decay(found)
        if slug == "match_updates":
            return {"share": MATCHED, "most": LARGEST_RISE}
        if slug == "repair_scale":
            # Where the data alone is at fault, the layers behind the first are as they should be.
            return {"first_only": found.rule.slug == "abnormal_data"}
        return {}

    def _decay(self, found: Diagnosed) -> dict[str, Any]:
        """The usual one, where it is so many times too strong; else that of the catalogue."""
        if found.evidence.signal != "weight_decay":
            return {}
        groups = (group for o in self._diagnosis.optimizers for group in o.param_groups)
        highest = max((float(group.get("weight_decay", 0.0)) for group in groups), default=0.0)
        return {"value": highest / found.evidence.value} if highest > 0 else {}

    def _rate(self, found: Diagnosed, given: int) -> float:
        if found.rule.slug in RAISES:
            return self._higher(found)
        excess = self._diagnosis.update_excess
        if self._young.has_learned and not follows_gradient(self._diagnosis.optimizers):
            # It learns with weights that have grown: a rate for the first ones hardly moves these.
            excess = self._diagnosis.newest_excess
        return self._lower(found, excess) ** (1 + given)

    def _rewind(self, found: Diagnosed, given: int) -> dict[str, Any]:
        found = self._cause(found)
        young = self._young
        died_unlearned = found.rule.slug == "dying_relu" and young.loses_nothing
        hurt = young.was_hurt or young.lost_units(found)
        anew = young.is_early or hurt or died_unlearned
        power = given + (0 if self._was_sudden(found) else 1)
        factor = max(self._lower(found, self._diagnosis.update_excess) ** power, STRONGEST)
        if died_unlearned and not hurt:
            factor = GENTLE  # updates are of a sound size, so a much lower rate would lose time
        return {"step": self._first_step if anew else found.since_step, "factor": factor}

    def _cause(self, found: Diagnosed) -> Diagnosed:
        """An open jump of the learning rate from before it: its weights and its rate are the cure.

        The losses since the jump look usual by themselves, as if the newest batch were at fault.
        """
        jumps = (d for d in self._diagnosis.diagnosis.open if d.evidence.signal == JUMPED)
        return next((jump for jump in jumps if jump.since_step <= found.since_step), found)

    @property
    def _first_step(self) -> int:
        """Of the first weights that can be had again: those after a repair, where there was one."""
        states = self._surgery.states
        return states.steps[0] if states is not None and states.steps else 0

    def _higher(self, found: Diagnosed) -> float:
        """A factor that brings the updates up to the usual share of the weights."""
        ratio = found.evidence.value if found.evidence.signal == Signal.UPDATE_RATIO else math.nan
        sound, first = STEADY, self._diagnosis.first_update
        if first > 0 and not follows_gradient(self._diagnosis.optimizers):
            sound, ratio = FIRST_OF_ADAPTIVE, first
        if not ratio > 0:
            return 1 / WEAKEST
        return min(max(sound / ratio, 1 / WEAKEST), 1 / STRONGEST)

    def _lower(self, found: Diagnosed, excess: float) -> float:
        """The factor back to the earlier rate, or to updates of a sound share, where known.

        Args:
            excess: how many times larger than sound ones the updates are; NaN unknown.
        """
        if found.evidence.signal == JUMPED:
            return max(1 / found.evidence.value, STRONGEST)
        if math.isnan(excess) and found.evidence.signal == Signal.UPDATE_RATIO:
            excess = found.evidence.value / STEADY
        if not excess > 0:
            return WEAKEST
        return min(max(1 / excess, STRONGEST), WEAKEST)

    def _was_sudden(self, found: Diagnosed) -> bool:
        """The loss was at its usual level until the fault: bad data, not the learning rate."""
        if found.rule.slug != "non_finite":
            return False
        return losses.were_usual_until(self._run, found.since_step)
