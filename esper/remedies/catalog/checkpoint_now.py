"""Keeps the present state of the run at once."""

from __future__ import annotations

from typing import Any

from esper.contracts import Risk
from esper.exceptions import GraftError
from esper.fail_closed import is_the_scripts
from esper.remedies.base import Effect, Remedy, Target


class CheckpointNow(Remedy):
    slug = "checkpoint_now"
    title = "Keep a checkpoint now"
    idea = (
        "Keeps the present weights, buffers and optimizer state among the good states that the run "
        "can be rewound to, and calls the checkpoint function that was given to attach. A state of "
        "a run with an open serious finding is saved by that function only."
    )
    source = "common practice"
    when = "A person wants to be able to come back to the present state."
    risk = Risk.NONE
    stays = False

    def so_far(self, details: dict[str, Any]) -> str:
        known = {"good_state": "good state", "checkpoint": "checkpoint"}
        return "; ".join(f"{known[name]} {value}" for name, value in details.items())

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        if target.checkpoint is not None:
            return ""
        why = "no good state can be kept here" if target.states is None else target.states.why_not
        return f"{why}, and attach was given no checkpoint function" if why else ""

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        details: dict[str, Any] = {}
        if target.states is not None and not target.states.why_not:
            details["good_state"] = f"kept of step {target.step}"
        elif target.states is not None:
            details["good_state"] = f"not kept: {target.states.why_not}"
        if target.checkpoint is not None:
            details["checkpoint"] = _saved(target)
        return Effect(details)

    def on_agreed(self, target: Target) -> None:
        """All ranks must keep the same steps, so none does before each has saved."""
        if target.states is not None and not target.states.why_not:
            target.states.keep(target.step)


def _saved(target: Target) -> str:
    assert target.checkpoint is not None
    try:
        where = target.checkpoint()
    except Exception as error:
        if is_the_scripts(error):
            raise
        raise GraftError(f"checkpoint() failed: {type(error).__name__}: {error}", layer="") from (
            error
        )
    return "saved" if where is None else str(where)
