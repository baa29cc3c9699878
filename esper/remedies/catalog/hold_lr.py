"""Trains with a learning rate of a given value, whatever schedulers do."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from esper.contracts import Risk
from esper.remedies.base import Effect, Remedy, Target, check_above_zero, no_optimizer, no_rate
from esper.remedies.update_hooks import substitute


class HoldLr(Remedy):
    slug = "hold_lr"
    title = "Set the learning rate"
    phrase = "Set the learning rate to {value:g}"
    idea = (
        "Uses one learning rate inside each optimizer step until it is taken back, whatever "
        "schedulers do meanwhile. Where parameter groups have different rates, the highest becomes "
        "the value, and the others keep their ratio to it. The optimizer's groups and the "
        "schedulers keep their own values. A change by a factor that comes later multiplies it."
    )
    source = "common practice; the value is a person's"
    when = "A person knows which rate the run should have."
    risk = Risk.LOW
    works_on_parts = True

    def default_config(self) -> dict[str, Any]:
        return {"value": 1e-3}

    def check_config(self, config: dict[str, Any]) -> None:
        check_above_zero(config, "value", most=1e3)

    def so_far(self, details: dict[str, Any]) -> str:
        return f"before: {details['before']:g}"

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        return no_optimizer(target) or no_rate(target)

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        own = [[float(g["lr"]) for g in o.param_groups] for o in target.optimizers]
        highest = max(rate for rates in own for rate in rates)
        details: dict[str, Any] = {"value": float(config["value"]), "before": highest}
        if any(rate != highest for rates in own for rate in rates) and highest > 0:
            details["shares"] = [[rate / highest for rate in rates] for rates in own]
        return self.resume(target, details)

    def resume(self, target: Target, details: dict[str, Any]) -> Effect:
        undone = "The learning rate is not changed in such a step."
        optimizers = target.optimizers
        shares: list[list[float]] = details.get("shares", [[]] * len(optimizers))
        ends = [
            substitute([optimizer], "lr", partial(_held, details["value"], own), undone)
            for optimizer, own in zip(optimizers, shares, strict=True)
        ]

        def end() -> None:
            for one in ends:
                one()

        return Effect(details, end)


def _held(value: float, shares: list[float], own: Any, place: int) -> Any:
    """The rate of a group; the value itself where nothing else is known."""
    rate = value * (shares[place] if place < len(shares) else 1.0)
    return torch.full_like(own, rate) if isinstance(own, torch.Tensor) else rate
