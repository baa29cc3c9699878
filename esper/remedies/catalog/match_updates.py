"""Chooses the learning rate by how far the updates move the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from esper.contracts import Risk
from esper.grafting.optimizers import parameters_of
from esper.health.optimizer_steps import spread_sample
from esper.remedies.base import Effect, Remedy, Target, check_above_zero, no_optimizer, no_rate
from esper.remedies.update_hooks import Optimizer, after_update, before_update, substitute

EVERY = 5  # updates between two rises
UPDATES = 200  # then the factor stays
WITHIN = 1.5  # an update between the wished share / this and times this is left as it is
FAR = 100.0  # times too small: the factor follows at once, otherwise by the square root
LARGEST_RISE = 10.0  # of the factor, in one change; a fall is never late, so it has no limit
RISES_AGAIN = 2.0  # times, from where it had to fall: chosen on seeds 0 to 9
FEW = 4096  # elements of a matrix


class MatchUpdates(Remedy):
    slug = "match_updates"
    title = "Match the learning rate to the updates"
    phrase = "Change the learning rate until an update is {share:g} of the weights"
    idea = (
        "Measures how far the updates move the weight matrices, and changes the learning rate "
        "inside each optimizer step until the median is the wished share: it rises in stages, and "
        "falls at once where updates grow, and does not rise far again after that. After 200 "
        "updates the factor stays."
    )
    source = "LARS, arXiv 1708.03888: the size of an update relative to that of the weights"
    when = "The learning rate of SGD is far too low, or was chosen anew and has to fit."
    risk = Risk.LOW

    def default_config(self) -> dict[str, Any]:
        return {"share": 1e-3, "most": 10.0}  # most: the largest factor, and 1 / the smallest

    def check_config(self, config: dict[str, Any]) -> None:
        check_above_zero(config, "share", most=0.1)
        check_above_zero(config, "most", most=1e6)

    def so_far(self, details: dict[str, Any]) -> str:
        changed = [factor for factor in details["factors"] if factor != 1.0]
        factors = " and ".join(f"{factor:.3g}" for factor in changed)
        return f"the rate is multiplied by {factors} so far" if factors else ""

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        return no_optimizer(target) or no_rate(target)

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        count = len(target.optimizers)
        limits = [float(config["most"])] * count
        details = {**config, "factors": [1.0] * count, "limits": limits, "updates": 0}
        return self.resume(target, details)

    def resume(self, target: Target, details: dict[str, Any]) -> Effect:
        limits = details.get("limits", [float(details["most"])] * len(target.optimizers))
        details = {**details, "factors": list(details["factors"]), "limits": list(limits)}
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
        self._share, self._pull = math.nan, math.nan  # of the latest update, and before it
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
        own = [p for p in parameters_of(optimizer) if p.ndim > 1 and p.grad is not None]
        self._before = [(p.detach(), _few(p.detach()).clone()) for p in own]
        pull = _pull(optimizer, own) if isinstance(optimizer, torch.optim.SGD) else math.nan
        # The gradient grows suddenly once a run learns: the rate must fall before that update.
        if self._pull > 0:
            self._fit(self._share * pull / self._pull, falls_only=True)
        self._pull = pull

    @torch.no_grad()
    def _look(self, _: Optimizer) -> None:
        before, self._before = self._before, []
        if before and self._updates > 1:
            self._share = _median([(_few(p) - old).norm() / old.norm() for p, old in before])
            self._fit(self._share, falls_only=bool(self._updates % EVERY))

    def _fit(self, share: float, *, falls_only: bool) -> None:
        """Changes the factor of the rate, where an update of this share of the weights is wrong."""
        # Updates grow with the momentum m, to 1 / (1 - m) of the first.
        wished = self._details["share"] * (1.0 - min(self._momentum, 0.99) ** self._updates)
        if not 0 < share < math.inf or 1.0 / WITHIN < share / wished < WITHIN:
            return
        wrong = wished / share
        if wrong > 1.0 and falls_only:
            return
        change = wrong if wrong > FAR or wrong < 1.0 else wrong**0.5
        old, lowest, limits = self._factor, 1.0 / self._details["most"], self._details["limits"]
        limit = limits[self._place]
        factor = min(max(old * min(change, LARGEST_RISE), lowest), limit)
        self._details["factors"][self._place] = factor
        if wrong < 1.0:
            # Where the loss stands still for a while, gradients are small. A rate that was raised
            # to fit those makes the next ones destroy what was learned.
            limits[self._place] = min(limit, RISES_AGAIN * factor)
        self._share *= factor / old  # what the next update would be


def _few(tensor: Tensor) -> Tensor:
    return spread_sample(tensor, FEW)


def _pull(optimizer: Optimizer, parameters: Iterable[Tensor]) -> float:
    """How far the next update of plain SGD moves the weights at a rate of 1, relative to them."""
    wanted = set(map(id, parameters))
    moves = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in wanted:
                continue
            move = _few(parameter.grad)
            momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                move = group["momentum"] * _few(momentum) + move
            moves.append(move.norm() / _few(parameter.detach()).norm())
    return _median(moves)


def _median(shares: list[Tensor]) -> float:
    """Of those that are finite; 0 where there is none."""
    known = torch.stack(shares).float() if shares else torch.zeros(0)
    known = known[known.isfinite()]
    return float(known.median()) if len(known) else 0.0
