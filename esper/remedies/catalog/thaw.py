"""Trains parameters that are frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from esper.contracts import Risk
from esper.grafting.companions.companion import accompany, dismiss, with_companions
from esper.grafting.optimizers import optimizer_of, parameters_of
from esper.grafting.slot import SLOT_NAME, find_host
from esper.remedies.base import Effect, Remedy, Target, no_optimizer


class Thaw(Remedy):
    slug = "thaw"
    title = "Train frozen parameters"
    idea = (
        "Sets requires_grad on the frozen parameters of a layer, or of the model. Those that no "
        "optimizer holds are trained beside the script's, in one of the same class that steps "
        "with it; the script's optimizer stays as it is."
    )
    source = "TrainCheck (OSDI'25): a part of the model is frozen by mistake"
    when = "All weight matrices of the model, or of a layer, are frozen, and should learn."
    risk = Risk.LOW
    asks = True
    scope = "both"

    def so_far(self, details: dict[str, Any]) -> str:
        return f"{details['parameters']:,} parameters"

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        if reason := no_optimizer(target):
            return reason
        return "" if frozen(target) else "no parameter that could learn is frozen"

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        named = frozen(target)
        numbers = sum(p.numel() for p in named.values())
        return self.resume(target, {"tensors": list(named), "parameters": numbers})

    def resume(self, target: Target, details: dict[str, Any]) -> Effect:
        names = set(details["tensors"])
        own = [p for name, p in target.model.named_parameters() if name in names]
        for parameter in own:
            parameter.requires_grad_(True)
        around = target.surroundings
        held = {id(p) for o in with_companions(around.optimizers) for p in parameters_of(o)}
        unheld = [p for p in own if id(p) not in held]
        if unheld:
            host = find_host(target.model, target.layer) if target.layer else target.model
            optimizer = optimizer_of(around.optimizers, host)
            accompany(optimizer, unheld, layer=target.layer, scaler=around.scaler)

        def end() -> None:
            dismiss(unheld, around.optimizers)
            for parameter in own:
                parameter.requires_grad_(False)
                parameter.grad = None

        return Effect(details, end)


def frozen(target: Target) -> dict[str, nn.Parameter]:
    """Parameters that are frozen and could learn, by name, without those of grafts."""
    own = {id(p) for p in target.parameters}
    return {
        name: p
        for name, p in target.model.named_parameters()
        if id(p) in own and not p.requires_grad and _can_learn(p, name)
    }


def _can_learn(parameter: torch.Tensor, name: str) -> bool:
    kind = parameter.is_floating_point() or parameter.is_complex()
    return kind and not parameter.is_inference() and SLOT_NAME not in name.split(".")
