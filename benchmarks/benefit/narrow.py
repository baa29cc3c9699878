"""A run with a model that is too small, and all that could be done with it at one moment.

Esper is attached from the first step. The moment is its first graft, or step :data:`AT_MOST`
without one. From there every arm has the same further steps on the same batches. The arms without
Esper begin from the run as it would be without Esper at that moment.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

import esper
from benchmarks import verdict_cases
from benchmarks.benefit.hosts import ADDED, Host, rows_of
from benchmarks.benefit.training import Curve, Run, evaluation_flops, level, step_flops
from esper.contracts import RunMode
from esper.exceptions import EsperError

AT_MOST, FURTHER, SCRATCH = 3_000, 1_500, 4_000  # steps
RESTARTED = SCRATCH  # steps of the restart; where Esper cost more, this is what is read
CLOCK = 1_000  # steps between two grafts by the clock
FACTORS = (0.1, 0.3, 3.0)  # of the rate, in the arms that change nothing else
SPAN_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass
class Record:
    """What became of one host with one seed.

    Attributes:
        moment: the step at which the arms part.
        sunk, scratch: arm -> held-out loss at the end of the further steps; after
            :data:`SCRATCH` steps from the first.
        grafts: what Esper put in, and what became of it.
        flops_steps, cpu_steps: steps that the restart could make for what Esper's further steps
            cost; ``scratch_*`` for what all its steps cost.
    """

    host: str
    seed: int
    narrow: bool
    moment: int = 0
    sunk: dict[str, float] = field(default_factory=dict)
    scratch: dict[str, float] = field(default_factory=dict)
    grafts: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    flops_steps: int = 0
    cpu_steps: int = 0
    scratch_flops_steps: int = 0
    scratch_cpu_steps: int = 0


@dataclass(frozen=True)
class Spent:
    """Esper's steps, evaluations and CPU seconds until some step."""

    steps: int
    evaluations: int
    cpu_s: float

    @classmethod
    def of(cls, run: Run) -> Spent:
        return cls(run.steps, run.evaluations, run.cpu_s)


def measure(host: Host, seed: int) -> Record:
    """All arms of one seed."""
    record = Record(host.name, seed, host.narrow)
    rows = rows_of(host, seed, AT_MOST + FURTHER)
    own = Run.new(host, rows, seed, host.rate)
    small_flops = step_flops(own)
    first, costs = _with_esper(own, record)
    _without(Run.new(host, rows, seed, host.rate), first, record)
    _restart(Run.new(host, rows, seed + 10_000, host.large_rate, ADDED), costs, small_flops, record)
    return record


@dataclass(frozen=True)
class Costs:
    """What Esper's run cost; FLOPs of the model as it was at the end."""

    before: Spent
    scratch: Spent
    after: Spent
    flops: int
    evaluation: int


def _with_esper(run: Run, record: Record) -> tuple[Any, Costs]:
    """(Esper's first graft or None, what it cost); fills Esper's part of the record."""
    grafts: list[Any] = []
    with attached(run, RunMode.AUTOMATIC) as session:

        def until_graft(loss: float) -> bool:
            session.step(loss)
            grafts.extend(session.adaptations[:1])
            return bool(grafts)

        def on(loss: float) -> bool:
            session.step(loss)
            return False

        run.train(AT_MOST, until_graft)
        record.moment, before, scratch = run.steps, Spent.of(run), Spent.of(run)
        # Both tracks are read from one run; the end of the one may come before that of the other.
        for end in sorted({SCRATCH, record.moment + FURTHER}):
            run.train(max(0, end - run.steps), on)
            if end == SCRATCH:
                scratch = Spent.of(run)
        costs = Costs(before, scratch, Spent.of(run), step_flops(run), evaluation_flops(run))
        record.parameters["Esper"] = run.parameters
        record.grafts = [str(entry) for entry in session.adaptations]
        loop = session._parts.remedies
        record.remedies = [
            f"{treatment.remedy} at step {treatment.step}, {treatment.ended or 'in force'}"
            for treatment in (loop.treatments if loop is not None else ())
        ]
    record.sunk["Esper"] = level(run.curve, record.moment + FURTHER)
    record.scratch["Esper"] = level(run.curve, SCRATCH)
    return (grafts[0] if grafts else None), costs


def attached(run: Run, mode: RunMode) -> esper.Session:
    return esper.attach(
        run.model, run.optimizer, mode=mode, evaluate=run.evaluate, server="", verbose=False
    )


def _without(run: Run, first: Any, record: Record) -> None:
    """Left alone, another rate, random growth, and Esper's graft at another layer."""
    run.train(record.moment)
    left = run.fork()
    left.train(max(FURTHER, SCRATCH - record.moment))
    _read(record, "left alone", run, left)
    changed = []
    for factor in FACTORS:
        other = run.fork()
        other.change_rate(factor)
        other.train(left.steps)
        changed.append(other)
    for track, at in ((record.sunk, record.moment + FURTHER), (record.scratch, SCRATCH)):
        track["rate alone"] = min(level(_whole(run, other), at) for other in changed)
    grown = run.fork()
    _grow_by_clock(grown, left.steps, random.Random(f"clock {record.seed}"))
    _read(record, "clock, random", run, grown)
    moved = run.fork()
    graft = first and _moved(moved, first, random.Random(f"moved {record.seed}"))
    if graft:
        moved.train(left.steps, _stepping([graft]))
        _read(record, "another layer", run, moved)
    record.parameters["left alone"] = run.parameters


def _read(record: Record, arm: str, before: Run, run: Run) -> None:
    record.sunk[arm] = level(_whole(before, run), record.moment + FURTHER)
    record.scratch[arm] = level(_whole(before, run), SCRATCH)


def _whole(before: Run, run: Run) -> Curve:
    """The curve of an arm that goes on from another run."""
    return before.curve + [(before.steps + step, loss) for step, loss in run.curve]


def _restart(run: Run, costs: Costs, small_flops: int, record: Record) -> None:
    """A larger model from the first step, read after as many steps, FLOPs, and CPU seconds."""
    run.train(RESTARTED)
    own, evaluation = step_flops(run), costs.evaluation
    before, end, scratch = costs.before, costs.after, costs.scratch
    further = (end.steps - before.steps) * costs.flops
    further += (end.evaluations - before.evaluations) * evaluation
    whole = before.steps * small_flops + max(0, scratch.steps - before.steps) * costs.flops
    whole += scratch.evaluations * evaluation
    share = FURTHER / max(1, end.steps - before.steps)
    record.flops_steps = round(share * further / own)
    record.cpu_steps = _steps_in(run, share * (end.cpu_s - before.cpu_s))
    record.scratch_flops_steps = round(whole / own)
    record.scratch_cpu_steps = _steps_in(run, scratch.cpu_s)
    record.parameters["restart"] = run.parameters
    for name, reads in (
        ("sunk", (FURTHER, record.flops_steps, record.cpu_steps)),
        ("scratch", (SCRATCH, record.scratch_flops_steps, record.scratch_cpu_steps)),
    ):
        for what, at in zip(("steps", "FLOPs", "CPU time"), reads, strict=True):
            getattr(record, name)[f"larger net, equal {what}"] = level(run.curve, at)


def _steps_in(run: Run, seconds: float) -> int:
    return round(seconds * run.steps / run.cpu_s)


# --- growth without Esper's choice ---------------------------------------------------------------


def _grow_by_clock(run: Run, steps: int, dice: random.Random) -> None:
    """A random graft at once, and one more each :data:`CLOCK` steps."""
    grafts: list[nn.Module] = []
    each = _stepping(grafts)
    while run.steps < steps:
        found = _random_graft(run, dice)
        if found is not None:
            grafts.append(found)
        run.train(min(CLOCK, steps - run.steps), each)


def _random_graft(run: Run, dice: random.Random) -> nn.Module | None:
    """Any blueprint but experts, any size and layer; None where ten draws could not be put in."""
    x, y = run.rows.train
    shown = verdict_cases.Host(
        run.host.name, run.model, run.optimizer, lambda step: (x[:32], y[:32]), (x, y),
        run.host.loss,
    )  # fmt: skip
    drawn = [
        (layer, slug, config, "")
        for layer, slug, config in verdict_cases.choices(shown, dice)
        if "expert" not in slug  # minutes for each
    ]
    drawn += [
        (layer, "widen_hidden", {"hidden": dice.choice(SPAN_SIZES)}, since)
        for since, layer in spans(run.model)
    ]
    dice.shuffle(drawn)
    for layer, slug, config, since in drawn[:10]:
        try:
            return _graft(run, layer, slug, config, since)
        except EsperError:
            continue
    return None


def _graft(run: Run, layer: str, slug: str, config: dict[str, Any], since: str) -> nn.Module:
    where = {"since": since} if since else {}
    sample = run.rows.train[0][:32]
    receipt = esper.graft(
        run.model, layer, slug, optimizer=run.optimizer, sample=sample, **where, **config
    )
    graft: nn.Module = receipt.graft
    return graft


def _moved(run: Run, first: Any, dice: random.Random) -> nn.Module | None:
    """Esper's blueprint and size at another layer; None where no other takes it."""
    config = dict(first.receipt.config)
    if first.since:
        places = [(layer, since) for since, layer in spans(run.model) if layer != first.layer]
    else:
        names = [name for name, part in run.model.named_modules() if isinstance(part, nn.Linear)]
        places = [(name, "") for name in names if name != first.layer]
    dice.shuffle(places)
    for layer, since in places:
        try:
            return _graft(run, layer, first.blueprint, config, since)
        except EsperError:
            continue
    return None


def spans(model: nn.Module) -> list[tuple[str, str]]:
    """Neighbouring linear layers."""
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    return list(pairwise(names))


def _stepping(grafts: list[nn.Module]) -> Callable[[float], bool]:
    """As a session does after every step."""

    def each(loss: float) -> bool:
        for graft in grafts:
            graft.on_step()  # type: ignore[operator]
        return False

    return each


# --- models that are large enough -----------------------------------------------------------------

ENOUGH = 1_500  # steps


def measure_wide(host: Host, seed: int) -> Record:
    """A model that needs nothing: Esper, left alone, another rate, and a larger one."""
    record = Record(host.name, seed, host.narrow, moment=ENOUGH)
    rows = rows_of(host, seed, ENOUGH)
    run = Run.new(host, rows, seed, host.rate)
    with attached(run, RunMode.AUTOMATIC) as session:

        def on(loss: float) -> bool:
            session.step(loss)
            return False

        run.train(ENOUGH, on)
        record.grafts = [str(entry) for entry in session.adaptations]
        loop = session._parts.remedies
        record.remedies = [str(treatment.remedy) for treatment in (loop.treatments if loop else ())]
        flops = run.steps * step_flops(run) + run.evaluations * evaluation_flops(run)
    record.scratch["Esper"] = level(run.curve)
    left = Run.new(host, rows, seed, host.rate)
    left.train(ENOUGH)
    record.scratch["left alone"] = level(left.curve)
    changed = []
    for factor in FACTORS:
        other = Run.new(host, rows, seed, host.rate * factor)
        other.train(ENOUGH)
        changed.append(level(other.curve))
    record.scratch["rate alone"] = float(np.min(changed))
    larger = Run.new(host, rows, seed + 10_000, host.large_rate, ADDED)
    larger.train(2 * ENOUGH)
    record.scratch_flops_steps = round(flops / step_flops(larger))
    record.scratch_cpu_steps = _steps_in(larger, run.cpu_s)
    for what, at in (
        ("steps", ENOUGH),
        ("FLOPs", record.scratch_flops_steps),
        ("CPU time", record.scratch_cpu_steps),
    ):
        record.scratch[f"larger net, equal {what}"] = level(larger.curve, at)
    return record
