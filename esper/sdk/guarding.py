"""The trainer's own guard: a graft on probation goes at once when training breaks."""

from __future__ import annotations

import math

from torch import nn

from esper import grafting
from esper.contracts import ViolationRule
from esper.grafting import GuardVerdict, LossGuard
from esper.sdk.local import LocalLoop
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery


class ProbationGuard:
    """Looks at each step's loss, and at the gradients while a graft is on probation.

    A run that diverges without such a graft is a finding of the diagnosis.

    Args:
        skips_steps: a ``GradScaler`` is used. It meets non-finite gradients in normal operation
            and skips such steps, so they are no evidence against a graft.
        local: local mode's loop, which learns from what the guard takes out.

    Attributes:
        losses: what the loss is compared with.
    """

    def __init__(
        self,
        surgery: Surgery,
        run: RunState,
        *,
        skips_steps: bool,
        local: LocalLoop | None,
    ) -> None:
        self.losses = LossGuard()
        self._surgery = surgery
        self._run = run
        self._skips_steps = skips_steps
        self._local = local

    def on_step(self, loss: float) -> None:
        """Takes out the youngest guarded graft when the loss diverges."""
        suspect = self._surgery.changes.youngest_guarded(self._run.step)
        verdict = self.losses.observe(loss)
        if verdict is None and suspect is not None and not self._skips_steps:
            verdict = _gradient_verdict(self._surgery.model)
        if verdict is None:
            return
        if suspect is None:
            self.losses.reset()  # from here on the new level is the normal one
            return
        gone = self._surgery.take_out_for_guard(suspect, verdict)
        self.losses.reset()
        if self._local is not None:
            self._local.on_rolled_back(gone, verdict.text)


def _gradient_verdict(model: nn.Module) -> GuardVerdict | None:
    names = grafting.non_finite_gradients(model)
    if not names:
        return None
    return GuardVerdict(
        ViolationRule.NON_FINITE, math.nan, math.nan, f"the gradient of {names[0]} is not finite"
    )
