"""Goes back to the weights with the lowest held-out loss."""

from __future__ import annotations

from typing import Any

from esper.contracts import Risk
from esper.remedies.base import Effect, Remedy, Target


class RestoreBest(Remedy):
    slug = "restore_best"
    title = "Restore the best held-out weights"
    idea = "Restores the weights, buffers and optimizer state that had the lowest held-out loss."
    source = "Early stopping, Prechelt 1998"
    when = "The held-out loss has risen for long while the training loss fell."
    risk = Risk.MEDIUM
    changes_weights = True
    asks = True  # it gives up what was learned since, which a run may go on to need
    stays = False

    def so_far(self, details: dict[str, Any]) -> str:
        return f"of step {details['to_step']:,}, held-out loss {details['held_out_loss']:.4g}"

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        if target.states is None or target.states.best is None:
            return "no held-out loss has been measured; give attach an evaluate function"
        return ""

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        assert target.states is not None
        assert target.states.best is not None
        loss, state = target.states.best
        target.states.restore(state)
        return Effect({"to_step": state.step, "held_out_loss": loss})
