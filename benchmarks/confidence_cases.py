"""Short paired trainings that show how often a graft of a kind helps, and remedies that were tried.

A host is trained and watched for some steps. From there it is trained once unchanged (the twin) and
once with each graft, on the same batches in the same order. What Esper would have known at that
moment is kept with the gain: findings, the layer's signals, the trend of the loss.

A remedy is tried on a run with a known fault; its case is whether its symptom went and stayed away.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import esper
from benchmarks import verdict_cases as hosts
from benchmarks.rescue.arms import Esper
from benchmarks.rescue.faults import at8
from benchmarks.rescue.training import train
from benchmarks.verdict_cases import Host
from esper.contracts import LayerInfo, RunSnapshot
from esper.exceptions import EsperError
from esper.health import extract_features
from esper.pipeline import evidence
from esper.policy.cases import Case, measured

STEPS_BEFORE = 600
STEPS_AFTER = 600  # as long as a probation may take
END_STEPS = 200  # the gain is the mean over so many last steps
LOOK_STEPS = 25
WATCHED_NARROW = 2_250  # steps after which the diagnosis can say that capacity is missing
NARROW_SHARE = 0.35  # of the hosts are strict bottlenecks
GRAFTS_EACH = 8
WIDER = "widen_hidden"
REMEDY_STEPS = 500


@dataclass(frozen=True)
class Watched:
    """A host at the moment of its grafts; places are (since, layer, blueprint, config)."""

    host: Host
    snapshot: RunSnapshot
    step: int
    places: list[tuple[str, str, str, dict[str, Any]]]


def watched(seed: int) -> Watched:
    """One host, trained and watched until the moment of the grafts."""
    rng = random.Random(f"confidence {seed}")
    torch.manual_seed(seed)
    narrow = rng.random() < NARROW_SHARE
    host = _narrow(rng) if narrow else hosts.make_host(rng)
    step = WATCHED_NARROW if narrow else STEPS_BEFORE
    snapshot = _watched(host, step)
    places = [("", *choice) for choice in hosts.choices(host, rng)]
    if narrow:
        places = [("0", "2", WIDER, {"hidden": rng.choice([8, 16, 32])}), *places[:3]]
    return Watched(host, snapshot, step, places[:GRAFTS_EACH])


def graft_cases(seed: int) -> list[Case]:
    """All grafts of one host."""
    start = watched(seed)
    host, snapshot, graft_step = start.host, start.snapshot, start.step
    last = graft_step + STEPS_AFTER
    twin = _end(host.fork(), graft_step + 1, last)
    layers = {layer.name: layer for layer in snapshot.layers}
    found = []
    for since, name, slug, config in start.places:
        if name not in layers:
            continue
        try:
            ends, parameters = _grafted(host.fork(), since, name, slug, config, graft_step, last)
        except EsperError:
            continue
        found.append(_case(seed, host, snapshot, layers[name], slug, parameters, twin, ends))
    return found


def narrow_cases(seed: int) -> list[Case]:
    """Wider hidden layers in one run that is too narrow, with two other grafts beside them.

    Such runs are what grafts are proposed for, and the mixture of :func:`graft_cases` has few.
    """
    rng = random.Random(f"confidence narrow {seed}")
    torch.manual_seed(seed)
    host = rng.choice([_narrow_deep_teacher, _narrow_deep_digits, _narrow])(rng)
    snapshot = _watched(host, WATCHED_NARROW)
    last = WATCHED_NARROW + STEPS_AFTER
    twin = _end(host.fork(), WATCHED_NARROW + 1, last)
    linear = [layer for layer in snapshot.layers if layer.kind == "Linear"]
    # The narrowest hidden layer lies before the layer that reads it.
    place = min(range(1, len(linear)), key=lambda number: linear[number].features_in)
    before, behind = linear[place - 1].name, linear[place].name
    sizes = rng.sample([4, 8, 16, 32], 2)
    places = [(before, behind, WIDER, {"hidden": size}) for size in sizes]
    places += [("", *choice) for choice in hosts.choices(host, rng)][:2]
    layers = {layer.name: layer for layer in snapshot.layers}
    found = []
    for since, name, slug, config in places:
        if name not in layers:
            continue
        try:
            ends, added = _grafted(host.fork(), since, name, slug, config, WATCHED_NARROW, last)
        except EsperError:
            continue
        found.append(_case(seed, host, snapshot, layers[name], slug, added, twin, ends))
    return found


def remedy_cases(seed: int) -> Iterator[Case]:
    """Every remedy that is proposed for the faults of a seed, with what came of it."""
    for kind, about in at8.AT_8.items():
        if about.bug:
            continue  # nothing in the run can repair it
        for fault in at8.cases(kind, range(seed, seed + 1), REMEDY_STEPS):
            outcome = train(fault.faulty(), fault.steps, seed, Esper("supervised"))
            for _, remedy, finding, ended in outcome.remedies:
                if ended == "in force":
                    continue  # the run was over before its window
                yield Case(
                    seed=seed,
                    host=kind,
                    kind="remedy",
                    choice=remedy,
                    layer="run",
                    finding=finding,
                    gain=math.nan,
                    error=math.nan,
                    success=ended.startswith("kept"),
                )


def _watched(host: Host, steps: int) -> RunSnapshot:
    """Trains the host with Esper attached; what a decision would have been made from."""
    session = esper.attach(
        host.model, host.optimizer, evaluate=host.evaluate, verbose=False, server=""
    )

    def step(loss: float) -> None:
        session.step(loss)

    _train(host, 1, steps, step)
    local = session._parts.local
    assert local is not None
    snapshot = local.snapshot()
    session.close()
    return snapshot


def _train(host: Host, first: int, last: int, each: Any) -> None:
    rates = [group["lr"] for group in host.optimizer.param_groups]
    for step in range(first, last + 1):
        for group, rate in zip(host.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * host.rate(step)
        x, y = host.batches(step)
        host.optimizer.zero_grad()
        loss = host.loss(host.model(x), y)
        torch.autograd.backward(loss)
        host.optimizer.step()
        each(loss.item())
    for group, rate in zip(host.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _end(host: Host, first: int, last: int, graft: Any = None) -> list[float]:
    """The held-out losses of the last steps."""
    held: list[float] = []
    steps = iter(range(first, last + 1))

    def each(loss: float) -> None:
        step = next(steps)
        if graft is not None:
            graft.on_step()
        if step > last - END_STEPS and step % LOOK_STEPS == 0:
            held.append(host.evaluate())

    _train(host, first, last, each)
    return held


def _grafted(
    host: Host,
    since: str,
    layer: str,
    slug: str,
    config: dict[str, Any],
    graft_step: int,
    last: int,
) -> tuple[list[float], int]:
    """(held-out losses of the last steps, parameters that were added)."""
    receipt = esper.graft(
        host.model,
        layer,
        slug,
        optimizer=host.optimizer,
        sample=host.batches(1)[0],
        **({"since": since} if since else {}),
        **config,
    )
    held = _end(host, graft_step + 1, last, receipt.graft)
    return held, receipt.certificate.parameters


def _case(
    seed: int,
    host: Host,
    snapshot: RunSnapshot,
    layer: LayerInfo,
    slug: str,
    parameters: int,
    twin: list[float],
    ends: list[float],
) -> Case:
    gains = np.array(
        [(off - on) / max(abs(off), 1e-12) for off, on in zip(twin, ends, strict=True)]
    )
    finite = np.nan_to_num(gains, nan=-1.0, posinf=1.0, neginf=-1.0)
    gain = float(finite.mean())
    finding = next((f for f in snapshot.findings if f.slug == "capacity"), None)
    features = extract_features(snapshot)
    return Case(
        seed=seed,
        host=host.kind,
        kind="graft",
        choice=slug,
        layer=str(layer.kind),
        finding="" if finding is None else "capacity",
        gain=gain,
        error=float(finite.std() / math.sqrt(len(finite) / 3)),
        success=gain > 0.005,
        measured=measured(evidence(features, layer.name), parameters, snapshot.model_parameters),
    )


def _narrow(rng: random.Random) -> Host:
    """A perceptron with too few hidden units: digits, few digits, a teacher, or text."""
    draw = rng.choice([_narrow_digits, _narrow_teacher, _narrow_digits])
    return draw(rng)


def _perceptron(inputs: int, units: int, outputs: int, rng: random.Random) -> nn.Module:
    act = rng.choice([nn.ReLU, nn.Tanh, nn.GELU])
    return nn.Sequential(nn.Linear(inputs, units), act(), nn.Linear(units, outputs))


def _narrow_digits(rng: random.Random) -> Host:
    x, y = hosts.shuffled(*hosts.digits(), rng)
    model = _perceptron(64, rng.choice([2, 3, 4, 5]), 10, rng)
    train_rows = rng.choice([400, 1197])
    return hosts.fixed("narrow digits", model, rng, x, y, train_rows, F.cross_entropy, 32)


def _narrow_teacher(rng: random.Random) -> Host:
    def make() -> nn.Module:
        return _perceptron(16, rng.choice([2, 3, 4]), 8, rng)

    return _taught("narrow teacher", make, rng)


def _deep(inputs: int, outputs: int, rng: random.Random) -> nn.Module:
    """Two hidden layers, the second of which is narrow."""
    wide, units = rng.choice([16, 24, 32]), rng.choice([2, 3, 4])
    act = rng.choice([nn.ReLU, nn.Tanh, nn.GELU])
    return nn.Sequential(
        nn.Linear(inputs, wide), act(), nn.Linear(wide, units), act(), nn.Linear(units, outputs)
    )


def _narrow_deep_teacher(rng: random.Random) -> Host:
    return _taught("narrow deep teacher", lambda: _deep(16, 8, rng), rng)


def _narrow_deep_digits(rng: random.Random) -> Host:
    x, y = hosts.shuffled(*hosts.digits(), rng)
    rows = rng.choice([400, 1197])
    model = _deep(64, 10, rng)
    return hosts.fixed("narrow deep digits", model, rng, x, y, rows, F.cross_entropy, 32)


def _taught(kind: str, make: Callable[[], nn.Module], rng: random.Random) -> Host:
    """A model that learns a random net, and noise."""
    inside = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    seed, noise = rng.randrange(2**31), rng.choice([0.0, 0.1, 0.3])
    model = make()

    @torch.no_grad()
    def draw(rows: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = np.random.default_rng((seed, key)).standard_normal((rows, 24))
        numbers = torch.tensor(values, dtype=torch.float32)
        return numbers[:, :16], inside(numbers[:, :16]) + noise * numbers[:, 16:]

    return Host(
        kind,
        model,
        hosts.optimizer_for(model, rng),
        partial(draw, 64),
        draw(600, 0),
        F.mse_loss,
    )
