"""A trained net is fitted to another task by low-rank updates: where should the budget go?

The net's own weights stay as they are. All arms add as many parameters, within the rounding of
ranks, and train as many steps. Esper's placing needs some steps with gradients of the weights,
which are counted: the other arms have them more.

Esper itself puts nothing in here: it grafts only where a finding says that capacity is missing.
What is measured is the ranking of layers that it would follow then.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

import esper
from benchmarks.benefit.hosts import Data, Host, digits, perceptron, rows_of, windows
from benchmarks.benefit.narrow import attached
from benchmarks.benefit.training import Run, level
from benchmarks.verdict_cases import text
from esper.contracts import RunMode
from esper.health import extract_features
from esper.policy.heuristic import bottlenecks

TRAINED, FITTED, PROBED = 1_500, 800, 100  # steps
EVEN_RANK = 2
FACTORS = (0.3, 3.0)


@dataclass(frozen=True)
class Task:
    """A host with the data that it is fitted to."""

    host: Host
    other: Host


def _turned() -> Data:
    pixels, labels = digits()
    return pixels.view(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64).contiguous(), labels


def _renamed() -> Data:
    """Each character of the text is replaced by another one."""
    codes, following = windows()
    other = torch.from_numpy(np.random.default_rng(1).permutation(int(text().max()) + 1))
    return other[codes], other[following]


def _deep(_: int) -> nn.Module:
    return perceptron(64, 64, 64, 64, 10)


def _reader(_: int) -> nn.Module:
    vocabulary = int(text().max()) + 1
    net = perceptron(64, 64, 64, 64, vocabulary)
    return nn.Sequential(nn.Embedding(vocabulary, 8), nn.Flatten(), *net)


_DIGITS = Host("digits, turned", digits, nn.functional.cross_entropy, _deep, 1e-3, 1e-3, False)
_TEXT = Host(
    "text, other letters", windows, nn.functional.cross_entropy, _reader, 1e-3, 1e-3, False
)
TASKS = (
    Task(_DIGITS, replace(_DIGITS, data=_turned)),
    Task(_TEXT, replace(_TEXT, data=_renamed)),
)


@dataclass
class Placed:
    """One task with one seed: arm -> held-out loss, and the layers that Esper ranks first."""

    task: str
    seed: int
    losses: dict[str, float]
    layers: list[str]


def measure(task: Task, seed: int) -> Placed:
    base = Run.new(task.host, rows_of(task.host, seed, TRAINED), seed, task.host.rate)
    base.train(TRAINED)
    rows = rows_of(task.other, seed, FITTED)
    names = [name for name, part in base.model.named_modules() if isinstance(part, nn.Linear)]
    start = Run(task.other, rows, base.model, base.optimizer)
    ranked = _ranked(start, names)
    dice = random.Random(f"layers {seed}")
    half = len(names) // 2
    drawn = dice.sample(names, half)
    losses = {
        "Esper's layers": _fitted(start, ranked[:half], FITTED - PROBED),
        "evenly": _fitted(start, names, FITTED),
        "rate alone": min(_fitted(start, names, FITTED, factor) for factor in FACTORS),
        "random layers": _fitted(start, drawn, FITTED),
        "Esper's last layers": _fitted(start, ranked[-half:], FITTED),
    }
    return Placed(task.host.name, seed, losses, ranked[:half])


def _ranked(start: Run, names: Sequence[str]) -> list[str]:
    """Linear layers, the bottleneck first, after some steps that change nothing."""
    run = Run(start.host, start.rows, copy.deepcopy(start.model), start.optimizer)
    run.optimizer = torch.optim.Adam(run.model.parameters(), lr=0.0)
    with attached(run, RunMode.OBSERVE) as session:

        def on(loss: float) -> bool:
            session.step(loss)
            return False

        run.train(PROBED, on)
        loop = session._parts.local
        assert loop is not None
        snapshot = loop.snapshot()
    features = extract_features(snapshot, {})
    found = bottlenecks(snapshot, features)
    scores = {layer.name: float(found.score[row]) for row, layer in enumerate(features.layers)}
    return sorted(names, key=lambda name: -scores.get(name, -1.0))


def _fitted(start: Run, layers: Sequence[str], steps: int, factor: float = 1.0) -> float:
    """The held-out loss with the budget on some layers."""
    torch.manual_seed(0)
    model = copy.deepcopy(start.model).requires_grad_(False)
    parts = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    sizes = {name: sum(part.weight.shape) for name, part in parts.items()}
    budget = EVEN_RANK * sum(sizes.values())
    rank = max(1, round(budget / sum(sizes[name] for name in layers)))
    rate = 3 * start.host.rate * factor
    # An optimizer needs a parameter; the grafts bring theirs.
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=rate)
    run = Run(start.host, start.rows, model, optimizer)
    sample = start.rows.train[0][:32]
    grafts = [
        esper.graft(model, name, "proj_lora_64", optimizer=optimizer, sample=sample, rank=rank)
        for name in layers
    ]

    def on(loss: float) -> bool:
        for receipt in grafts:
            receipt.graft.on_step()
        return False

    run.train(steps, on)
    return level(run.curve)
