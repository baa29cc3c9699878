"""The trainer's own guard: a graft on probation goes at once when training breaks."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from esper.contracts import ViolationRule
from esper.grafting import GradientGuard, GuardVerdict, LossGuard, weights_are_finite
from esper.sdk.adaptation import Adaptation
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
        acted_at: the step at which it took a graft out the last time; -1: it has not.
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
        self.acted_at = -1
        self._rewinds = run.rewinds
        self._gradients = GradientGuard()
        self._looked_for: Adaptation | None = None

    def take(self, losses: Iterable[float]) -> None:
        """Losses of steps in which no graft was in the model."""
        for loss in losses:
            if self.losses.observe(loss) is not None:
                self.losses.reset()

    def on_step(self, loss: float, at: int) -> None:
        """Takes out the youngest guarded graft when the loss diverges.

        Args:
            at: the loss's step; on a GPU, an earlier one than the present.
        """
        suspect = self._surgery.changes.youngest_guarded(at)
        if self._run.rewinds != self._rewinds:
            self._start_again()
        verdict = self.losses.observe(loss)
        if suspect is not self._looked_for:
            self._gradients.forget()
            self._looked_for = suspect
        if verdict is None and suspect is not None and not self._skips_steps:
            model = self._surgery.model
            verdict = _gradient_verdict(model, self._gradients.look(model))
        if verdict is None:
            return
        if suspect is None:
            self.losses.reset()  # from here on the new level is the normal one
            return
        gone = self._surgery.removals.take_out_for_guard(suspect, verdict)
        self.acted_at = self._run.step
        self.losses.reset()
        if self._local is not None:
            self._local.on_rolled_back(gone, verdict.text)

    def _start_again(self) -> None:
        """The weights are earlier ones, and the measure is the losses that led to them."""
        self._rewinds = self._run.rewinds
        self.losses.reset()
        self.take([loss for _, loss in self._run.losses_of_its_weights()])


def _gradient_verdict(model: nn.Module, names: tuple[str, ...]) -> GuardVerdict | None:
    """None where no update was made of such a gradient.

    A script, or a ``GradScaler`` that has not made any step yet, leaves such an update out. Where
    the update comes after this, the next loss is not finite.
    """
    if not names or weights_are_finite(model, names):
        return None
    return GuardVerdict(
        ViolationRule.NON_FINITE, math.nan, math.nan, f"the gradient of {names[0]} is not finite"
    )
