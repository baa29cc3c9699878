"""Chooses the learning rate by how far the updates move the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper.contracts import Risk
from esper.grafting.optimizers import parameters_of
from esper.remedies.base import Effect, Remedy, Target, check_above_zero, no_optimizer, no_rate
from esper.remedies.update_hooks import Optimizer, after_update, before_update, substitute

EVERY = 5  # updates between two measurements; each is one read from the device
UPDATES = 200  # then the factor stays
WITHIN = 1.5  # an update between the wished share / this and times this is left as it is
FAR = 100.0  # times too small: the factor follows at once, otherwise by the square root
LARGEST_RISE, LARGEST_FALL = 10.0, 2.0  # of the factor, in one change
FEW = 256  # elements of a matrix


class MatchUpdates(Remedy):
    slug = "match_updates"
    title = "Match the learning rate to the updates"
    phrase = "Change the learning rate until an update is {share:g} of the weights"
    idea = (
        "Measures how far the updates move the weight matrices, and changes the learning rate in "
        "small stages, inside each optimizer step, until the median is the wished share. After "
        "200 updates the factor stays."
    )
    source = "LARS, arXiv 1708.03888: the size of an update relative to that of the weights"
    when = "The learning rate of SGD is far too low, or was chosen anew and has to fit."
    risk = Risk.LOW

    def default_config(self) -> dict[str, Any]:
        return {"share": 1e-3, "most": 10.0}  # most: the largest factor, and 1 / the smallest

    def check_config(self, config: dict[str, Any]) -> None:
        check_above_zero(config, "share", most=0.1)
        check_above_zero(config, "most", most=1e6)

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        return no_optimizer(target) or no_rate(target)

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        factors = [1.0] * len(target.optimizers)
        return self.resume(target, {**config, "factors": factors, "updates": 0})

    def resume(self, target: Target, details: dict[str, Any]) -> Effect:
        details = {**details, "factors": list(details["factors"])}
        parts = [_Match(o, details, place) for place, o in enumerate(target.optimizers)]

        def end() -> None:
            for part in parts:
                part.end()

        return Effect(details, end)


class _Match:
    """The learning rate of one optimizer."""

    def __init__(self, optimizer: Optimizer, details: dict[str, Any], place: int) -> None:
        self._details = details
        self._place = place
        self._updates = int(details["updates"])
        momenta = (float(group.get("momentum", 0.0)) for group in optimizer.param_groups)
        self._momentum = max(momenta, default=0.0)
        self._before: list[tuple[Tensor, Tensor]] = []
        undone = "The learning rate is not changed in such a step."
        self._handles = before_update([optimizer], self._keep, undone)
        self._handles += after_update([optimizer], self._look, undone)
        self._end = substitute([optimizer], "lr", lambda own, _: own * self._factor, undone)

    def end(self) -> None:
        self._end()
        for handle in self._handles:
            handle.remove()
        self._before.clear()

    @property
    def _factor(self) -> float:
        return float(self._details["factors"][self._place])

    def _keep(self, optimizer: Optimizer) -> None:
        if self._updates >= UPDATES:
            return
        self._updates += 1
        self._details["updates"] = self._updates
        if self._updates % EVERY == 0:
            own = (p for p in parameters_of(optimizer) if p.ndim > 1 and p.grad is not None)
            self._before = [(p.detach(), _few(p.detach()).clone()) for p in own]

    @torch.no_grad()
    def _look(self, _: Optimizer) -> None:
        before, self._before = self._before, []
        if not before:
            return
        moved = torch.stack([(_few(p) - old).norm() / old.norm() for p, old in before]).float()
        share = float(moved[moved.isfinite()].median()) if bool(moved.isfinite().any()) else 0.0
        # Updates grow with the momentum m, to 1 / (1 - m) of the first.
        wished = self._details["share"] * (1.0 - min(self._momentum, 0.99) ** self._updates)
        if not share > 0 or 1.0 / WITHIN < share / wished < WITHIN:
            return
        wrong = wished / share
        change = wrong if wrong > FAR else wrong**0.5
        most = float(self._details["most"])
        factor = self._factor * min(max(change, 1.0 / LARGEST_FALL), LARGEST_RISE)
        self._details["factors"][self._place] = min(max(factor, 1.0 / most), most)


def _few(tensor: Tensor) -> Tensor:
    """At most 256 elements, spread over the tensor."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // FEW)][:FEW]
