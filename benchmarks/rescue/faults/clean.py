"""Healthy runs that are longer than the others: whatever is found in them is a false alarm."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import nn

from benchmarks.rescue.cases import Case, Trial
from benchmarks.rescue.faults import at8, deform, silent12

TIER = "Clean"


def net(data: str, depth: int, optimizer: str, seed: int) -> Trial:
    activation = nn.Tanh if data in ("circles", "blobs") else nn.ReLU
    return at8.Draw(data, depth, activation, optimizer, seed).trial()


def cases(seed: int, steps: int) -> Iterator[Case]:
    """Each kind of model once; the run with the fault is the healthy one."""
    trials = {
        "points": functools.partial(net, "blobs", 3, "sgd", seed),
        "digits": functools.partial(net, "digits", 3, "adam", seed),
        "images": functools.partial(net, "images", 4, "adam", seed),
        "text": functools.partial(net, "text", 3, "adam", seed),
        "residual": functools.partial(silent12.healthy, seed),
        "decoder": functools.partial(deform.healthy, "decoder", seed),
        "encoder": functools.partial(deform.healthy, "encoder", seed),
    }
    for kind, make in trials.items():
        yield Case(TIER, kind, "healthy", seed, steps, make, make, learned=-1.0)
