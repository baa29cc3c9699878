"""Trains the trainable tensors that no optimizer holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from esper.contracts import Risk
from esper.grafting.companions.companion import accompany, dismiss, with_companions
from esper.grafting.optimizers import parameters_of
from esper.grafting.slot import SLOT_NAME
from esper.remedies.base import Effect, Remedy, Target, no_optimizer

STILL_STEPS = 10  # for so long they must not have moved


class Adopt(Remedy):
    slug = "adopt"
    title = "Train what no optimizer holds"
    idea = (
        "Trains these tensors beside the script's optimizer, in one of the same class that steps "
        "with it, at the rate of its first group. The script's optimizer stays as it is."
    )
    source = "TrainCheck (OSDI'25): parameters that never reach the optimizer"
    when = "A trainable tensor gets a gradient, is in no parameter group, and has not moved."
    risk = Risk.LOW

    def so_far(self, details: dict[str, Any]) -> str:
        return f"{details['parameters']:,} parameters"

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        if reason := no_optimizer(target):
            return reason
        named = orphans(target)
        if not named:
            return "the optimizers hold every trainable tensor that gets a gradient"
        old = None if target.states is None else target.states.before(target.step - STILL_STEPS)
        if old is None:
            return "it is not known yet whether something else trains these tensors"
        moved = [n for n, p in named.items() if not torch.equal(p.detach(), old.on(n, p))]
        return f"something else trains {moved[0]}" if moved else ""

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        named = orphans(target)
        numbers = sum(p.numel() for p in named.values())
        return self.resume(target, {"tensors": list(named), "parameters": numbers})

    def resume(self, target: Target, details: dict[str, Any]) -> Effect:
        names = set(details["tensors"])
        first = target.surroundings.optimizers[0]
        own = [p for name, p in target.model.named_parameters() if name in names]
        accompany(first, own, layer=target.layer, scaler=target.surroundings.scaler)
        return Effect(details, lambda: dismiss(own, [first]))


def orphans(target: Target) -> dict[str, nn.Parameter]:
    """Trainable tensors with a gradient that no optimizer holds, without those of grafts."""
    optimizers = with_companions(target.surroundings.optimizers)
    held = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
    return {
        name: p
        for name, p in target.model.named_parameters()
        if p.requires_grad
        and p.grad is not None
        and id(p) not in held
        and SLOT_NAME not in name.split(".")
    }
