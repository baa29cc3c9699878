"""Goes back to an earlier good state, and trains on from there with a lower rate."""

from __future__ import annotations

from typing import Any

from esper.contracts import Risk
from esper.contracts.remedies import MARKED
from esper.exceptions import ConfigurationError
from esper.remedies.base import Effect, Remedy, Target, check_above_zero, no_optimizer
from esper.remedies.catalog.set_lr import SetLr
from esper.remedies.catalog.skip_update import SkipUpdate
from esper.remedies.good_state import State


class Rewind(Remedy):
    slug = "rewind"
    title = "Rewind to a good state"
    phrase = "Rewind to {step:state} and {factor:rate}"
    idea = (
        "Restores the weights, buffers and optimizer state of an earlier good step, multiplies the "
        "learning rate by a factor, and leaves out updates that are not finite. Schedulers and "
        "data go on, so the batches in between are skipped. Where the loss stays high with the "
        "earlier weights, the data or the targets have changed, and the rewind is undone."
    )
    source = "PaLM, arXiv 2204.02311, section 5.1: restart before the spike, skip the batches"
    when = "The loss has diverged, or weights are not finite."
    risk = Risk.MEDIUM
    changes_weights = True

    def default_config(self) -> dict[str, Any]:
        # -1: the youngest good state; MARKED: the one in which the first remedy was given.
        return {"step": -1, "factor": 0.5}

    def check_config(self, config: dict[str, Any]) -> None:
        step = config["step"]
        if isinstance(step, bool) or not isinstance(step, int) or step < MARKED:
            raise ConfigurationError(f"step must be a step's number, -1 or -2, got {step!r}")
        check_above_zero(config, "factor", most=1.0)

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        if config["step"] == MARKED and target.states is not None:
            return "" if _state(target, MARKED) is not None else "there is no marked state"
        if target.states is None or not target.states.steps:
            if target.states is not None and target.states.too_large:
                return "the model is larger than the memory that good states may take"
            return "no good state of this run has been kept yet"
        wanted = config["step"]
        if _state(target, wanted) is None:
            known = ", ".join(str(step) for step in target.states.steps)
            return (
                f"there is no good state of this form up to step {_latest(target, wanted)}; good "
                f"states are kept of the steps {known}"
            )
        return ""

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        assert target.states is not None
        state = _state(target, config["step"])
        assert state is not None
        target.states.restore(state)
        return self.resume(target, {"to_step": state.step, "factor": float(config["factor"])})

    def resume(self, target: Target, details: dict[str, Any]) -> Effect:
        parts = []
        if details["factor"] != 1.0 and not no_optimizer(target):
            parts.append(SetLr().apply(target, {"factor": details["factor"]}))
        if not SkipUpdate().why_not(target, {}):
            parts.append(SkipUpdate().apply(target, {}))

        def end() -> None:
            for part in parts:
                part.end()

        return Effect(details, end)


def _state(target: Target, wanted: int) -> State | None:
    assert target.states is not None
    if wanted != MARKED:
        return target.states.before(_latest(target, wanted))
    marked = target.states.marked
    return marked if marked is not None and target.states.fits(marked) else None


def _latest(target: Target, wanted: int) -> int:
    return target.step if wanted == -1 else wanted
