"""Clips each tensor's gradient relative to its own recent norms."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.contracts import Risk
from esper.remedies.base import (
    Effect,
    Remedy,
    Target,
    check_above_zero,
    many_gradients,
    no_optimizer,
    not_trained,
)
from esper.remedies.update_hooks import Optimizer, after_update, before_update
from esper.sharding import is_dtensor, local

logger = logging.getLogger("esper")

CALM = 100  # updates without an unusual norm, after which nothing is clipped any more
UNUSUAL = 4.0  # times the usual norm
LOOK_EVERY = 10  # updates between two looks at the state; each is one read from the device


class ClipLayer(Remedy):
    slug = "clip_layer"
    title = "Clip gradients per tensor"
    phrase = "Clip each gradient at {factor:g} times its recent norm"
    idea = (
        "Scales the gradient of each tensor down where its norm exceeds a multiple of the running "
        "mean of its own clipped norms. Below that limit a gradient stays as it is. After 100 "
        "updates without a gradient of four times the usual norm the clip of a tensor is lifted, "
        "until there is one again."
    )
    source = "AdaGC, arXiv 2502.11034"
    when = "Single gradients explode or spike while the rest of the run is sound."
    risk = Risk.LOW
    works_on_parts = True
    scope = "both"

    def default_config(self) -> dict[str, Any]:
        return {"factor": 1.05, "decay": 0.98}

    def check_config(self, config: dict[str, Any]) -> None:
        check_above_zero(config, "factor", most=1e3)
        check_above_zero(config, "decay", most=0.9999)

    def so_far(self, details: dict[str, Any]) -> str:
        lifted, put_back = details["lifted"], details["put_back"]
        if len(lifted) > len(put_back):
            return f"lifted since step {lifted[-1]:,}, as no gradient is unusual"
        return ""

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        reason = no_optimizer(target) or many_gradients(target)
        return reason or (not_trained(target) if target.layer else "")

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        details: dict[str, Any] = {**config, "lifted": [], "put_back": []}
        clip = _Clip(target, details)
        unmeasured = "No gradient is clipped in it."
        handles = before_update(target.optimizers, clip.work, unmeasured)
        handles += after_update(target.optimizers[:1], clip.count, unmeasured)

        def end() -> None:
            for handle in handles:
                handle.remove()

        return Effect(details, end)


class _Clip:
    """The limits; they stay on the gradients' devices, where all but a look at them is computed."""

    def __init__(self, target: Target, details: dict[str, Any]) -> None:
        self._only = {id(p) for p in target.parameters}
        self._details = details
        self._step = target.step
        self._states: dict[int, _State] = {}

    def work(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None or id(parameter) not in self._only or gradient.is_sparse:
                    continue
                self._clip(id(parameter), gradient)

    def count(self, _: Optimizer) -> None:
        """One step is over; records where the clip was lifted from all tensors, or put back."""
        self._step += 1
        if self._step % LOOK_EVERY or not self._states:
            return
        device = next(iter(self._states.values())).calm.device
        calm = torch.stack([state.calm.to(device) for state in self._states.values()])
        lifted = bool((calm >= CALM).all())
        if lifted == (len(self._details["lifted"]) > len(self._details["put_back"])):
            return
        self._details["lifted" if lifted else "put_back"].append(self._step)
        done = (
            f"lifted: no gradient was unusual in {CALM} updates" if lifted
            else "put back: a gradient was unusual again"
        )  # fmt: skip
        logger.info("step %d: the clip of the gradients was %s", self._step, done)

    @torch.no_grad()
    def _clip(self, key: int, gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        if is_dtensor(norm):
            norm = norm.full_tensor()
        state = self._states.get(key)
        if state is None:  # the first gradient is the measure of those that follow
            self._states[key] = _State(norm, norm, torch.zeros_like(norm))
            return
        factor, decay = float(self._details["factor"]), float(self._details["decay"])
        # An earlier norm that was zero or not finite gives no limit.
        known = state.mean.isfinite() & (state.mean > 0)
        usual = norm <= UNUSUAL * state.usual
        state.calm = torch.where(usual, state.calm + 1, 0.0)
        lifted = state.calm >= CALM
        limit = torch.where(known & ~lifted, factor * state.mean, norm)
        scale = torch.where(norm > limit, limit / norm, torch.ones_like(norm))
        local(gradient).mul_(scale.to(gradient.dtype))
        clipped = torch.minimum(norm, limit)
        state.mean = _follow(state.mean, clipped, known, decay)
        state.usual = _follow(state.usual, torch.minimum(norm, UNUSUAL * state.usual), known, decay)


@dataclass(slots=True)
class _State:
    """Of one tensor, three scalars.

    Attributes:
        mean: of its clipped norms; usual: of its norms, which follows where they grow.
        calm: updates since its norm was unusual.
    """

    mean: Tensor
    usual: Tensor
    calm: Tensor


def _follow(mean: Tensor, newest: Tensor, known: Tensor, decay: float) -> Tensor:
    return torch.where(known & newest.isfinite(), torch.lerp(newest, mean, decay), newest)
