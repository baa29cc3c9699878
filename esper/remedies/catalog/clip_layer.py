"""Clips each tensor's gradient relative to its own recent norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper.contracts import Risk
from esper.remedies.base import Effect, Remedy, Target, check_above_zero, no_optimizer, not_trained
from esper.remedies.update_hooks import Optimizer, before_update
from esper.sharding import is_dtensor, local


class ClipLayer(Remedy):
    slug = "clip_layer"
    title = "Clip gradients per tensor"
    phrase = "Clip each gradient at {factor:g} times its recent norm"
    idea = (
        "Scales the gradient of each tensor down where its norm exceeds a multiple of the running "
        "mean of its own clipped norms. Below that limit a gradient stays as it is."
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

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        return no_optimizer(target) or (not_trained(target) if target.layer else "")

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        only = {id(p) for p in target.parameters}
        clip = _Clip(only, float(config["factor"]), float(config["decay"]))
        handles = before_update(target.optimizers, clip.work, "No gradient is clipped in it.")

        def end() -> None:
            for handle in handles:
                handle.remove()

        return Effect(dict(config), end)


class _Clip:
    """The limits; everything stays on the gradients' devices."""

    def __init__(self, only: set[int], factor: float, decay: float) -> None:
        self._only = only
        self._factor = factor
        self._decay = decay
        self._means: dict[int, Tensor] = {}

    @torch.no_grad()
    def work(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None or id(parameter) not in self._only or gradient.is_sparse:
                    continue
                self._clip(id(parameter), gradient)

    def _clip(self, key: int, gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        if is_dtensor(norm):
            norm = norm.full_tensor()
        mean = self._means.get(key)
        if mean is None:  # the first gradient is the measure of those that follow
            self._means[key] = norm
            return
        # An earlier norm that was zero or not finite gives no limit.
        known = mean.isfinite() & (mean > 0)
        limit = torch.where(known, self._factor * mean, norm)
        scale = torch.where(norm > limit, limit / norm, torch.ones_like(norm))
        local(gradient).mul_(scale.to(gradient.dtype))
        clipped = torch.minimum(norm, limit)
        self._means[key] = torch.where(
            known & clipped.isfinite(), torch.lerp(clipped, mean, self._decay), clipped
        )
