"""Trains with another weight decay."""

from __future__ import annotations

from typing import Any

from esper.contracts import Risk
from esper.remedies.base import Effect, Remedy, Target, check_above_zero, no_optimizer
from esper.remedies.update_hooks import substitute


class WeightDecay(Remedy):
    slug = "weight_decay"
    title = "Change the weight decay"
    phrase = "Set the weight decay to {value:g}"
    idea = (
        "Uses another weight decay inside each optimizer step, in the groups that have one. The "
        "optimizer's groups keep their own values."
    )
    source = "Loshchilov and Hutter 2019, arXiv 1711.05101"
    when = "The training loss falls while the held-out loss rises."
    risk = Risk.LOW
    works_on_parts = True

    def default_config(self) -> dict[str, Any]:
        return {"value": 0.01}

    def check_config(self, config: dict[str, Any]) -> None:
        check_above_zero(config, "value", most=10.0)

    def so_far(self, details: dict[str, Any]) -> str:
        return f"before: {', '.join(f'{value:g}' for value in details['before'])}"

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        if reason := no_optimizer(target):
            return reason
        groups = [group for o in target.optimizers for group in o.param_groups]
        decays = any("weight_decay" in group for group in groups)
        return "" if decays else "the optimizer has no weight decay"

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        value = float(config["value"])
        undone = "The weight decay is not changed in such a step."
        groups = [group for o in target.optimizers for group in o.param_groups]
        before = sorted({float(g["weight_decay"]) for g in groups if "weight_decay" in g})
        end = substitute(target.optimizers, "weight_decay", lambda *_: value, undone)
        return Effect({"value": value, "before": before}, end)
