"""Rescales weights so that the activations of every layer have a sound spread.

Shape legend: N rows, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import layout
from esper.contracts import Risk
from esper.grafting.certify import put_back
from esper.grafting.graph import kind_of
from esper.grafting.remedies import is_tied
from esper.remedies.base import Effect, Remedy, Target

ROUNDS = 4  # how often one layer is measured and scaled
SOUND = (0.9, 1.1)  # a spread between these is left as it is
LARGEST_FACTOR = 1e4
_KINDS = layout.LINEAR | layout.TRANSPOSED_LINEAR | layout.CONVOLUTION


class RepairScale(Remedy):
    slug = "repair_scale"
    title = "Repair the scale of the weights"
    idea = (
        "Scales the weights of each layer, in the order in which they run, so that the standard "
        "deviation of its output on one batch is 1. The last layer is only scaled down."
    )
    source = "LSUV, Mishkin and Matas 2016, arXiv 1511.06422"
    when = "The initialisation makes activations vanish, explode or saturate before training."
    risk = Risk.MEDIUM
    changes_weights = True
    stays = False

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        if target.sample is None:
            return "it needs a batch of the model's inputs; give it as sample"
        return "" if _candidates(target.model) else "the model has no linear layer or convolution"

    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        factors: dict[str, float] = {}
        with torch.no_grad(), put_back(target.model, None):
            order = _order(target.model, target.sample)
            for name in order:
                factor = _repair(target.model, name, target.sample, last=name == order[-1])
                if factor != 1.0:
                    factors[name] = factor
        return Effect({"factors": factors})


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if kind_of(module) in _KINDS
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and not is_tied(model, module)
    }


def _order(model: nn.Module, sample: Any) -> list[str]:
    """Names of the layers as they run."""
    seen: dict[str, None] = {}
    candidates = _candidates(model)
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.setdefault(name))
        for name, module in candidates.items()
    ]
    try:
        _run(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


def _repair(model: nn.Module, name: str, sample: Any, *, last: bool) -> float:
    """Scales one layer; returns the factor of its weights."""
    module = model.get_submodule(name)
    weight = module._parameters["weight"]
    assert weight is not None
    total = 1.0
    for _ in range(ROUNDS):
        spread = _spread(model, module, sample)
        sound = SOUND[0] <= spread <= SOUND[1] or (last and spread <= SOUND[1])
        if sound or not 0 < spread < float("inf"):
            break
        factor = min(max(1.0 / spread, 1.0 / LARGEST_FACTOR), LARGEST_FACTOR)
        weight.mul_(factor)
        total *= factor
    return total


def _spread(model: nn.Module, module: nn.Module, sample: Any) -> float:
    """Standard deviation of the layer's output within each channel's batch, over all channels."""
    found: list[float] = []
    axis = layout.channel_axis_of(kind_of(module))

    def look(_: nn.Module, __: Any, y: Any) -> None:
        if isinstance(y, Tensor):
            rows_NC = y.detach().float().movedim(axis, -1).flatten(0, -2)
            found.append(float(rows_NC.var(0, unbiased=False).mean().sqrt()))

    with _watching(module, look):
        _run(model, sample)
    return max(found, default=0.0)


@contextmanager
def _watching(module: nn.Module, look: Any) -> Iterator[None]:
    handle = module.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _run(model: nn.Module, sample: Any) -> None:
    if isinstance(sample, dict):
        model(**sample)
    elif isinstance(sample, tuple | list):
        model(*sample)
    else:
        model(sample)
