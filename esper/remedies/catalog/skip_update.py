"""Leaves out updates whose gradients are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper.contracts import Risk
from esper.grafting.ranks.replicas import RankGroup
from esper.remedies.base import Effect, Remedy, Target, many_gradients, no_optimizer
from esper.remedies.update_hooks import Optimizer, after_update, before_update
from esper.sharding import local


class SkipUpdate(Remedy):
    slug = "skip_update"
    title = "Skip updates that are not finite"
    idea = (
        "Leaves out an optimizer step where a gradient is NaN or infinite, as a gradient scaler "
        "does. Weights, moments and counters stay as they are in such a step."
    )
    source = "torch.amp.GradScaler; AutoTrainer's exploding gradient"
    when = "Single batches give gradients that are not finite."
    risk = Risk.LOW
    works_on_parts = True

    def so_far(self, details: dict[str, Any]) -> str:
        return f"{details['skipped']:,} skipped so far" if details["skipped"] else ""

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        if reason := no_optimizer(target):
            return reason
        scaler = target.surroundings.scaler
        if scaler is not None and scaler.is_enabled():
            return "the gradient scaler skips such steps already"
        if reason := many_gradients(target):
            return reason
        if not _finite([p.detach() for p in target.parameters]):
            return "weights are not finite already"
        return ""

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        details: dict[str, Any] = {"skipped": 0}
        replicas = target.surroundings.replicas
        spread = replicas is not None and replicas.layout is not None
        skip = _Skip(details, replicas if spread else None)
        handles = before_update(target.optimizers, skip.hide, "No update is skipped.")
        handles += after_update(target.optimizers, skip.show, "No update is skipped.")

        def end() -> None:
            for handle in handles:
                handle.remove()

        return Effect(details, end)


class _Skip:
    """Without a gradient, an optimizer passes a parameter over.

    Args:
        ranks: where each holds parts of the gradients only, they agree in each step.
    """

    def __init__(self, details: dict[str, Any], ranks: RankGroup | None) -> None:
        self._details = details
        self._ranks = ranks
        self._hidden: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def hide(self, optimizer: Optimizer) -> None:
        own = [p for group in optimizer.param_groups for p in group["params"]]
        pairs = [(p, p.grad) for p in own if p.grad is not None]
        if not pairs or self._agree(_finite([gradient for _, gradient in pairs])):
            return
        self._details["skipped"] += 1
        self._hidden[id(optimizer)] = pairs
        for parameter, _ in pairs:
            parameter.grad = None

    def _agree(self, finite: bool) -> bool:
        return finite if self._ranks is None else all(self._ranks.values(float(finite)))

    def show(self, optimizer: Optimizer) -> None:
        for parameter, gradient in self._hidden.pop(id(optimizer), ()):
            parameter.grad = gradient


def _finite(gradients: list[Tensor]) -> bool:
    """One read from the device for all of them, which is the cost of this remedy."""
    values = [g._values() if g.is_sparse else local(g.detach()) for g in gradients]
    peaks = torch._foreach_norm([v for v in values if v.numel()], float("inf"))
    first = peaks[0].device if peaks else torch.device("cpu")
    return not peaks or bool(torch.stack([p.to(first) for p in peaks]).isfinite().all())
