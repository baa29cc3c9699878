"""Asks the training loop to stop."""

from __future__ import annotations

from typing import Any

from esper.contracts import Risk
from esper.exceptions import ConfigurationError
from esper.remedies.base import Effect, Remedy, Target


class StopEarly(Remedy):
    slug = "stop_early"
    title = "Stop the training"
    idea = (
        "Asks the loop to stop, and restores the weights, buffers and optimizer state that had the "
        "lowest held-out loss. Lightning and the transformers Trainer stop after the step. A loop "
        "of its own goes on until it reads session.should_stop; Esper ends no loop by itself."
    )
    source = "Early stopping, Prechelt 1998"
    when = "The held-out loss has risen for long, and a higher weight decay did not help."
    risk = Risk.MEDIUM
    works_on_parts = True
    changes_weights = True
    asks = True

    def default_config(self) -> dict[str, Any]:
        return {"restore_best": True}

    def check_config(self, config: dict[str, Any]) -> None:
        if not isinstance(config["restore_best"], bool):
            raise ConfigurationError(
                f"restore_best must be True or False, got {config['restore_best']!r}"
            )

    def so_far(self, details: dict[str, Any]) -> str:
        step = details["restored_step"]
        restored = f"the best weights, of step {step:,}, are restored; " if step >= 0 else ""
        return f"{restored}{details['told']}"

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        return "the loop was asked to stop already" if target.stop.asked else ""

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        best = target.states.best if target.states is not None else None
        restored = -1  # no held-out loss has been measured, or the weights were not wanted
        if config["restore_best"] and best is not None:
            assert target.states is not None
            target.states.restore(best[1])
            restored = best[1].step
        return self.resume(target, {**config, "restored_step": restored})

    def resume(self, target: Target, details: dict[str, Any]) -> Effect:
        target.stop.asked = True
        obeys = target.stop.obeyed_by
        told = f"{obeys} stops" if obeys else "the loop must read session.should_stop"

        def end() -> None:
            target.stop.asked = False

        return Effect({**details, "told": told}, end)
