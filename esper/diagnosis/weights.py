"""What the weights of a model show: how they started, and which of them are equal.

Shape legend: R sampled rows of a matrix, C elements of a row.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from esper.diagnosis.facts import TensorFacts
from esper.diagnosis.samples import FEW, TABLES, fan_in, is_graft, plain_kind_of, sampled
from esper.grafting.tensors.saved_values import numbers_of
from esper.health.optimizer_steps import has_numbers, spread_sample

EQUAL_ROWS = 0.5
ALIKE = 0.05  # relative distance
INITIALISED_ALIKE = ("Linear", "Conv1d", "Conv2d", "Conv3d")
FEWEST_OF_UNIFORM, MOST_OF_UNIFORM = 64, 2048  # elements
FEWEST_OF_NORMAL = 512
UNIFORM = 2.0  # / sqrt(elements): Kolmogorov and Smirnov's distance, which 0.1 % exceed by chance
BEYOND = 1.005  # of the limit; rounding of bfloat16


def read_tensors(model: nn.Module) -> tuple[TensorFacts, ...]:
    """The parameters as they are now, from a sample of each one's elements."""
    modules = dict(model.named_modules())
    found: list[TensorFacts] = []
    seen: dict[tuple[Any, ...], str] = {}
    for name, parameter in model.named_parameters():
        if not has_numbers(parameter) or not parameter.numel() or is_graft(name):
            continue
        layer = name.rpartition(".")[0]
        kind = plain_kind_of(modules.get(layer, model))  # a class may give names of its own
        sample = sampled(parameter.detach()).float().cpu()
        facts = _tensor_facts(name, layer, kind, parameter, sample)
        if facts.is_matrix and facts.std > 0:
            key = (facts.shape, numbers_of(sample).tobytes())
            facts = replace(facts, twin=seen.get(key, ""))
            seen.setdefault(key, name)
        found.append(facts)
    return tuple(found)


def still_symmetric(model: nn.Module, tensors: Sequence[TensorFacts]) -> tuple[str, ...]:
    """Those that started with equal rows, or as a copy of another tensor, and still nearly are."""
    found = []
    parameters = dict(model.named_parameters())
    for facts in tensors:
        own = parameters.get(facts.name)
        if own is None or own.shape != facts.shape:
            continue
        sample = sampled(own.detach()).float()
        if facts.equal_rows >= EQUAL_ROWS and not facts.all_zero and facts.shape[0] > 2:
            alike = _distance(sample[1:], sample[:-1]) < ALIKE
            if float(alike.float().mean()) >= EQUAL_ROWS:
                found.append(facts.name)
        elif facts.twin in parameters:
            other = sampled(parameters[facts.twin].detach()).float().to(sample.device)
            if float(_distance(sample, other).median()) < ALIKE:
                found.append(facts.name)
    return tuple(found)


def same_modules(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Pairs of places in one container that hold the same module with parameters."""
    found = []
    for path, container in model.named_modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        first: dict[int, str] = {}
        for name, child in container._modules.items():  # named_children() skips them
            if not any(True for _ in child.parameters()):
                continue
            place = f"{path}.{name}" if path else name
            if id(child) in first:
                found.append((first[id(child)], place))
            first.setdefault(id(child), place)
    return tuple(found)


@torch.no_grad()
def weights_digest(model: nn.Module) -> float:
    """A number that is equal for equal weights: a checksum of a few elements of each tensor."""
    parts = [
        spread_sample(p.detach(), FEW).double().cpu() for p in model.parameters() if has_numbers(p)
    ]
    return float(zlib.crc32(torch.cat(parts).numpy().tobytes())) if parts else 0.0


def _tensor_facts(
    name: str, layer: str, kind: str, parameter: nn.Parameter, sample: Tensor
) -> TensorFacts:
    std = float(sample.std(correction=0))
    equal, gain = math.nan, math.nan
    if parameter.ndim >= 2:
        # Rows of one number in another class scale one feature each, as those of (IA)³ do.
        units = sample.shape[1] > 1 or kind in INITIALISED_ALIKE
        if len(sample) > 1 and kind not in TABLES and units:
            equal = float((sample[1:] == sample[:-1]).all(1).float().mean())
        if kind not in TABLES:
            gain = std * math.sqrt(fan_in(parameter.shape, kind))
    return TensorFacts(
        name=name,
        layer=layer,
        kind=kind,
        shape=tuple(parameter.shape),
        trainable=parameter.requires_grad,
        std=std,
        equal_rows=equal,
        all_zero=not bool(sample.any()),
        gain=gain,
        untrained=_is_untrained(sample, parameter.shape, kind),
    )


def _is_untrained(sample: Tensor, shape: Sequence[int], kind: str) -> bool:
    """It is uniform between -1 / sqrt(inputs) and its opposite, as torch's own layers start.

    Training moves some elements beyond the limit, and most of them by different amounts. Tables
    start normal, with a standard deviation of 1.
    """
    if kind in TABLES and sample.numel() >= FEWEST_OF_NORMAL:
        return _is_spread_as(torch.special.ndtr(sample.flatten()))
    if kind not in INITIALISED_ALIKE or len(shape) < 2 or sample.numel() < FEWEST_OF_UNIFORM:
        return False
    share = sample.flatten().abs() * math.sqrt(fan_in(shape, kind))
    if float(share.max()) > BEYOND:
        return False
    return _is_spread_as(share)


def _is_spread_as(share: Tensor) -> bool:
    """It is uniform between 0 and 1."""
    share = share[:: math.ceil(share.numel() / MOST_OF_UNIFORM)]
    spread = share.sort().values - torch.linspace(
        0, 1, share.numel(), dtype=torch.float32, device="cpu"
    )
    return float(spread.abs().max()) < UNIFORM / math.sqrt(share.numel())


def _distance(a_RC: Tensor, b_RC: Tensor) -> Tensor:
    """float [R]: relative distance of each pair of rows."""
    size = a_RC.norm(dim=1).clamp_min(1e-30)
    distance: Tensor = (a_RC - b_RC).norm(dim=1) / size
    return distance
