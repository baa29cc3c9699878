"""Measures the held-out loss at once."""

from __future__ import annotations

import math
from typing import Any

from esper.contracts import Risk
from esper.exceptions import GraftError
from esper.remedies.base import Effect, Remedy, Target


class EvaluateNow(Remedy):
    slug = "evaluate_now"
    title = "Evaluate now"
    idea = (
        "Calls the evaluate function that was given to attach, once, at the next step boundary. "
        "The held-out loss is shown with the result and in the run's curves."
    )
    source = "common practice"
    when = "A person wants to know the held-out loss before the next evaluation is due."
    risk = Risk.NONE
    stays = False

    def so_far(self, details: dict[str, Any]) -> str:
        return f"held-out loss {details['held_out_loss']:.4g}"

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        return "" if target.evaluate is not None else "attach was given no evaluate function"

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        assert target.evaluate is not None
        loss = target.evaluate()
        if math.isnan(loss):
            raise GraftError("evaluate() returned no number", layer="")
        return Effect({"held_out_loss": loss})
