"""Trains the run, or one layer, with a multiple of its learning rate."""

from __future__ import annotations

from typing import Any

import torch

from esper.contracts import Risk
from esper.remedies.base import (
    Effect,
    Remedy,
    Target,
    check_above_zero,
    no_optimizer,
    no_rate,
    not_trained,
)
from esper.remedies.update_hooks import ScaledUpdates, substitute


class SetLr(Remedy):
    slug = "set_lr"
    title = "Change the learning rate"
    phrase = "{factor:rate}"
    idea = (
        "Multiplies the learning rate inside each optimizer step. The optimizer's groups and the "
        "schedulers keep their own values."
    )
    source = "AutoTrainer, doi 10.1109/TDSC.2024.3450951: a cure of four of its eight problems"
    when = "The loss oscillates or diverges, or the updates are far too large or too small."
    risk = Risk.LOW
    works_on_parts = True
    scope = "both"

    def default_config(self) -> dict[str, Any]:
        return {"factor": 0.5}

    def check_config(self, config: dict[str, Any]) -> None:
        check_above_zero(config, "factor", most=1e6)

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        if reason := no_optimizer(target):
            return reason
        if target.layer:
            if any(isinstance(o, torch.optim.LBFGS) for o in target.optimizers):
                return "LBFGS searches along one line for all layers"
            return not_trained(target)
        return no_rate(target)

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        factor = float(config["factor"])
        if target.layer:
            only = {id(p) for p in target.parameters}
            return Effect({"factor": factor}, ScaledUpdates(target.optimizers, only, factor).end)
        undone = "The learning rate is not changed in such a step."
        end = substitute(target.optimizers, "lr", lambda own, _: own * factor, undone)
        return Effect({"factor": factor}, end)
