"""How long each stage of the loop takes, with its budget and the seed document's value.

``python -m benchmarks.latency [--quick] [--json FILE] [--server URL --token …]``

One torch thread. Other load changes the figures: run it on an idle machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.figures import Budget, Figure, show, write_json
from benchmarks.overhead import BUDGET_ABSOLUTE_MS, BUDGET_RATIO, HOSTS, LONG_STEP_MS
from benchmarks.overhead import measure as measure_overhead
from esper import blueprints, grafting
from esper.blueprints import Blueprint
from esper.compilation import KernelStore, build_kernel, kernel_key, open_kernel, warm_up
from esper.compilation.instantiate import instantiate
from esper.constraints.remedy_gates import RemedyInputs, check_remedy
from esper.contracts import (
    SIGNAL_INDEX,
    SIGNALS,
    AdaptationType,
    CostForecast,
    Decision,
    Finding,
    HealthFrame,
    LayerInfo,
    Plan,
    RunMode,
    RunSnapshot,
    SafetyPolicy,
    Severity,
    Signal,
    ViolationRule,
    signing,
)
from esper.contracts.variants import Factors
from esper.exceptions import ConfigurationError
from esper.grafting import LayerRecorder
from esper.pipeline import decide
from esper.planning import plan_run
from esper.policy import HeuristicPolicy
from esper.policy.heuristic import CAPACITY
from esper.remedies import list_remedies
from esper.selection import BlueprintSelector

WIDTH = 256
BUDGETS = {
    "decision": Budget("p99", 10.0, "ms", "< 100 ms"),
    "decision_2000": Budget("p99", 50.0, "ms", "< 100 ms"),
    "decision_span": Budget("p99", 10.0, "ms", "< 100 ms"),
    "plan": Budget("p99", 50.0, "ms", "< 100 ms"),
    "selection": Budget("p99", 1.0, "ms", "< 10 ms"),
    "remedy_gates": Budget("p99", 1.0, "ms", "< 10 ms"),
    "compile_cold": Budget("p95", 150.0, "ms", "50-500 ms"),
    "compile_cached": Budget("p95", 5.0, "ms", "< 10 ms"),
    "graft_pause": Budget("p95", 10.0, "ms"),
    "overhead": Budget("p50", BUDGET_RATIO, "x"),
    "overhead_short": Budget("p50", BUDGET_ABSOLUTE_MS, "ms"),
    "end_to_end": Budget("p95", 500.0, "ms", "< 1 s"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0 even if a budget is exceeded, since other load can cause it."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    repeats = 30 if options.quick else 200
    warm_up()
    with tempfile.TemporaryDirectory(prefix="esper-latency-") as name:
        directory = Path(name)
        figures = [
            decision("decision", layers=200, repeats=repeats),
            decision("decision_2000", layers=2000, repeats=repeats),
            decision("decision_span", layers=200, repeats=repeats, spans=True),
            plan(repeats=repeats),
            selection(repeats=repeats * 5),
            remedy_gates(repeats=repeats),
            compile_cold(repeats=max(3, repeats // 10), directory=directory),
            compile_cached(repeats=repeats, directory=directory),
            graft_pause(repeats=max(10, repeats // 4)),
            *overhead(quick=options.quick),
        ]
    if not options.without_processes:
        adaptations = 3 if options.quick else 20
        figures.append(
            _end_to_end(adaptations=adaptations, server=options.server, token=options.token)
        )
    print(show(figures))
    if options.json:
        write_json(figures, options.json)
    return 0


def decision(name: str, *, layers: int, repeats: int, spans: bool = False) -> Figure:
    """Snapshot -> Decision on a finding, with 32 frames and 2,000 losses.

    ``spans``: an activation alone lies between the layers, so the answer is a span.
    """
    snapshot = flat_run(layers, spans=spans)
    selector = BlueprintSelector(blueprints.list_blueprints())
    policy, limits = HeuristicPolicy(), SafetyPolicy()
    rng = np.random.default_rng(0)
    answer = decide(snapshot, policy, selector, limits, rng)
    assert isinstance(answer, Decision), answer
    assert bool(answer.adaptation.since) is spans
    samples = timed(lambda: decide(snapshot, policy, selector, limits, rng), repeats)
    what = f"decide(), {layers} layers, 32 frames, {'a span' if spans else 'beside one layer'}"
    return Figure(name, BUDGETS[name], samples, what)


def plan(*, repeats: int) -> Figure:
    """Snapshot -> plan of three changes: spans and single layers, 200 of them."""
    snapshot = flat_run(200, spans=True)
    selector = BlueprintSelector(blueprints.list_blueprints())
    policy, limits = HeuristicPolicy(), SafetyPolicy(max_plan_changes=3)
    rng = np.random.default_rng(0)
    answer = plan_run(snapshot, policy, selector, limits, rng)
    assert isinstance(answer, Plan), answer
    samples = timed(lambda: plan_run(snapshot, policy, selector, limits, rng), repeats)
    what = f"plan_run(), 200 layers, {len(answer)} changes out of spans and single layers"
    return Figure("plan", BUDGETS["plan"], samples, what)


def selection(*, repeats: int) -> Figure:
    """18 blueprints x 600 sizes: the installed ones under more names, with more sizes each."""
    installed = blueprints.list_blueprints()
    catalog = [ManySizes(installed[number % len(installed)], number) for number in range(18)]
    selector, snapshot, limits = BlueprintSelector(catalog), flat_run(8), SafetyPolicy()
    layer = snapshot.layers[0]

    def select() -> object:
        return selector.select(layer, AdaptationType.ADD_EFFICIENCY, snapshot, limits)

    select()  # the tables of a layer's shape are computed once per run
    return Figure(
        "selection", BUDGETS["selection"], timed(select, repeats), "18 blueprints x 600 sizes"
    )


def remedy_gates(*, repeats: int) -> Figure:
    """All gates of every remedy of the catalogue, as when a finding could have any of them."""
    limits = SafetyPolicy()
    every = [
        RemedyInputs(RunMode.AUTOMATIC, 2000, remedy.slug, risk=remedy.risk, age_seconds=0.0)
        for remedy in list_remedies()
    ]

    def check() -> object:
        return [check_remedy(inputs, limits) for inputs in every]

    note = f"the gates of {len(every)} remedies"
    return Figure("remedy_gates", BUDGETS["remedy_gates"], timed(check, repeats), note)


def compile_cold(*, repeats: int, directory: Path) -> Figure:
    """Build, certify, measure, sign and store, for every blueprint that fits, in a warm worker."""
    private_key = signing.generate_private_key()
    samples: list[float] = []
    for layer, blueprint in fitting():
        for repeat in range(repeats):
            store = KernelStore(directory / f"cold-{layer.kind}-{blueprint.slug}-{repeat}")
            started = time.perf_counter()
            store.put(build_kernel(layer, blueprint.slug, private_key=private_key))
            samples.append((time.perf_counter() - started) * 1e3)
    note = f"tier 0 at width {WIDTH}, stored; p50 budget 50 ms"
    return Figure("compile_cold", BUDGETS["compile_cold"], tuple(samples), note)


def compile_cached(*, repeats: int, directory: Path) -> Figure:
    """Key -> digest -> files -> verified -> module."""
    private_key = signing.generate_private_key()
    trusted_key = signing.public_key(private_key)
    store = KernelStore(directory / "cached")
    samples: list[float] = []
    for layer, blueprint in fitting():
        digest = store.put(build_kernel(layer, blueprint.slug, private_key=private_key))
        index = {kernel_key(layer, blueprint.slug, None).hash: digest}

        load = partial(_load, store, index, layer, blueprint.slug, trusted_key)
        samples += timed(load, max(3, repeats // 10))
    note = "look up, read, verify, instantiate"
    return Figure("compile_cached", BUDGETS["compile_cached"], tuple(samples), note)


def _load(
    store: KernelStore, index: dict[str, str], layer: LayerInfo, slug: str, trusted_key: str
) -> None:
    digest = index[kernel_key(layer, slug, None).hash]
    _, spec, _ = open_kernel(store.get(digest), digest, trusted_key)
    instantiate(spec, layer)


def graft_pause(*, repeats: int) -> Figure:
    """The training loop's pause for a prebuilt graft in a model of about 1 M parameters."""
    samples = []
    for repeat in range(repeats):
        model, optimizer, layer = _trained_host()
        blueprint = blueprints.get_blueprint("proj_lora_64")
        graft = blueprint.build(layer, seed=repeat + 1)
        memory = grafting.SnapshotMemory.reserve(model, (optimizer,))  # as a session does
        receipt = grafting.apply_graft(
            model,
            layer,
            blueprint,
            surroundings=grafting.Surroundings((optimizer,)),
            graft=graft,
            seed=repeat + 1,
            memory=memory,
        )
        samples.append(receipt.pause_ms)
    note = "snapshot, certificate, swap; 1 M parameters"
    return Figure("graft_pause", BUDGETS["graft_pause"], tuple(samples), note)


def overhead(*, quick: bool) -> list[Figure]:
    """The overhead of observing a step, from benchmarks.overhead: a ratio, or ms on short steps."""
    hosts = [host for host in HOSTS if host.name in ("perceptron", "convolutions")]
    figures = []
    for row in measure_overhead(quick=quick, watchers=["esper"], hosts=hosts):
        is_long = row["bare_p50"] >= LONG_STEP_MS
        name = "overhead" if is_long else "overhead_short"
        value = row["ratio"] if is_long else row["absolute_ms"]
        note = f"attached against bare, medians of {row['n']} steps; {row['host']}"
        figures.append(Figure(name, BUDGETS[name], (value,), note))
    return figures


def _end_to_end(*, adaptations: int, server: str, token: str) -> Figure:
    from benchmarks.end_to_end import end_to_end

    note = "frame sent -> graft acknowledged, real processes"
    samples = tuple(end_to_end(adaptations, server=server, token=token))
    return Figure("end_to_end", BUDGETS["end_to_end"], samples, note)


def timed(work: Callable[[], object], repeats: int) -> tuple[float, ...]:
    """Milliseconds of each repetition; the first, which warms up, does not count."""
    work()
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        samples.append((time.perf_counter() - started) * 1e3)
    return tuple(samples)


def linear_layer(name: str, *, rows: int = 64, width: int = WIDTH) -> LayerInfo:
    return LayerInfo(
        name=name,
        kind="Linear",
        in_shape=(rows, width),
        out_shape=(rows, width),
        dtype="float32",
        parameters=width * (width + 1),
        graftable=True,
        features_in=width,
        features_out=width,
    )


def flat_run(layers: int, *, spans: bool = False) -> RunSnapshot:
    """A run with a finding of missing capacity, plausible signals and one bottleneck."""
    rng = np.random.default_rng(0)
    infos = tuple(linear_layer(f"layer{i}") for i in range(layers))
    if spans:
        infos = tuple(
            replace(info, order=i + 1, feeds=(f"layer{i + 1}",), activation="relu")
            for i, info in enumerate(infos)
        )
    stuck = Finding(
        rule=ViolationRule.DIAGNOSIS,
        layer=f"layer{layers // 2}",
        severity=Severity.CAUTION,
        observed="both losses are flat",
        limit="a fall",
        remedy="Add hidden units.",
        slug=CAPACITY,
    )
    names = tuple(info.name for info in infos)
    loss = 0.9 + 1.4 * 0.99 ** np.arange(2000) + 0.01 * rng.standard_normal(2000)
    frames = tuple(
        HealthFrame(step, 0.0, names, _plausible(rng, layers)) for step in range(1690, 2001, 10)
    )
    return RunSnapshot(
        run="benchmark",
        epoch=1,
        mode=RunMode.AUTOMATIC,
        step=2000,
        layers=infos,
        frames=frames,
        loss_steps=np.arange(1, 2001),
        loss=loss,
        model_parameters=sum(info.parameters for info in infos),
        findings=(stuck,),
    )


class ManySizes:
    """An installed blueprint under another name, with 600 sizes."""

    def __init__(self, blueprint: Blueprint, number: int) -> None:
        self._blueprint = blueprint
        self.slug = f"{blueprint.slug}_{number}"
        self.category = blueprint.category
        self.adaptation_type = AdaptationType.ADD_EFFICIENCY
        self.risk = blueprint.risk
        self.kind = blueprint.kind
        self.conflicts: frozenset[str] = frozenset()
        self.requires: frozenset[str] = frozenset()
        self.parts = 1

    def refusal(self, layer: LayerInfo) -> str:
        return ""

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        return tuple({"size": size} for size in range(1, 601))

    def forecast(self, layer: LayerInfo, config: dict[str, Any]) -> CostForecast:
        size = int(config["size"])
        return CostForecast(2 * size * layer.features_in, size * 1000, size / 100, float("nan"))

    def varied(self, layer: LayerInfo, factors: Factors) -> dict[str, Any]:
        raise ConfigurationError("it has every size already")


def _plausible(rng: np.random.Generator, layers: int) -> Any:
    values = rng.uniform(0.1, 0.3, (layers, len(SIGNALS))).astype(np.float32)
    values[:, SIGNAL_INDEX[Signal.UPDATE_RATIO]] = 1e-3
    values[:, SIGNAL_INDEX[Signal.DEAD_FRACTION]] = 0.0
    values[:, SIGNAL_INDEX[Signal.HEALTH]] = 0.9
    values[layers // 2, SIGNAL_INDEX[Signal.STABLE_RANK]] = 0.6
    values[layers // 2, SIGNAL_INDEX[Signal.GRAD_NORM]] = 3.0
    return values


def fitting() -> list[tuple[LayerInfo, Blueprint]]:
    """Every blueprint at a layer that it fits."""
    flat, sequence = linear_layer("flat"), _sequence_layer()
    found = []
    for blueprint in blueprints.list_blueprints():
        layer = next((one for one in (flat, sequence) if not blueprint.supports(one)), None)
        if layer is not None:
            found.append((layer, blueprint))
    return found


def _sequence_layer() -> LayerInfo:
    shape = (4, 32, WIDTH)
    return LayerInfo(
        name="sequence",
        kind="Linear",
        in_shape=shape,
        out_shape=shape,
        dtype="float32",
        parameters=WIDTH * (WIDTH + 1),
        graftable=True,
        features_in=WIDTH,
        features_out=WIDTH,
    )


def _trained_host() -> tuple[nn.Module, torch.optim.Optimizer, LayerInfo]:
    """A traced model with Adam's state, as in a real run."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(500, 500), nn.ReLU()) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    grafting.prepare_slots(model, [f"{i}.0" for i in range(4)])
    recorder = LayerRecorder(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(32, 500)).square().mean().backward()
        optimizer.step()
    return model, optimizer, recorder.layers()[1]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument(
        "--without-processes", action="store_true", help="leave out end_to_end, which starts Esper"
    )
    parser.add_argument("--server", default="", help="use this Esper instead of starting one")
    parser.add_argument("--token", default="", help="scope runs:create, for --server")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
