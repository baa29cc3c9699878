"""What a kernel costs by blueprint, cold, cached and compiled, beside torch.compile.

``python -m benchmarks.kernels [--quick] [--json FILE]``

One torch thread. Every row is the same module at the same shape (width 256) in one run:

    tier 0 cold     build, certify, measure, sign, store
    tier 0 cached   look up, read, verify, instantiate
    tier 1 cold     Inductor in its own process, as in a compile worker
    tier 1 load     verify and load the machine code in a trainer that has loaded one before
    tier 1 gain     eager time over compiled time, forward and backward; not used below 1.05
    compile cold    torch.compile's first forward and backward, with an empty cache directory
    compile warm    the same after torch._dynamo.reset(), every cache hit
    pool            kernels a second from two worker processes that take from one list
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.latency import fitting, timed
from esper.blueprints import Blueprint
from esper.compilation import (
    KernelStore,
    build_compiled,
    build_kernel,
    kernel_key,
    load_compiled,
    open_compiled,
    open_kernel,
    try_compiled,
    warm_up,
)
from esper.compilation.instantiate import instantiate
from esper.compilation.native import inductor_in
from esper.compilation.trial import sample
from esper.contracts import GraftKind, LayerInfo, codec, signing
from esper.exceptions import CompilerMissingError, KernelBuildError

QUICK = ("proj_lora_64", "proj_ia3")
WORKERS = 2


@dataclass(slots=True)
class Row:
    """One blueprint; None if not measured; ``note`` says why."""

    blueprint: str
    cold_ms: float
    cached_ms: float
    tier1_cold_s: float | None = None
    tier1_load_ms: float | None = None
    tier1_gain: float | None = None
    compile_cold_s: float | None = None
    compile_warm_ms: float | None = None
    note: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 0 always: a slow kernel is a result."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    private_key = signing.generate_private_key()
    warm_up()
    chosen = [(x, b) for x, b in fitting() if not options.quick or b.slug in QUICK]
    rows = []
    for layer, blueprint in chosen:
        rows.append(measure(layer, blueprint, private_key, repeats=5 if options.quick else 20))
        print(_line(rows[-1]) if len(rows) > 1 else f"{HEAD}\n{_line(rows[-1])}", flush=True)
    rates = {n: pool(n, kernels=20 if options.quick else 100) for n in (1, WORKERS)}
    print(f"pool: {rates[1]:.1f} kernels/s with one worker, {rates[WORKERS]:.1f} with {WORKERS}")
    if options.json:
        result = {
            "rows": [asdict(row) for row in rows],
            "pool_kernels_per_second": {str(n): rate for n, rate in rates.items()},
        }
        options.json.write_bytes(codec.encode(result))
    return 0


def measure(layer: LayerInfo, blueprint: Blueprint, private_key: str, *, repeats: int) -> Row:
    """All columns of one blueprint."""
    slug = blueprint.slug
    with tempfile.TemporaryDirectory(prefix="esper-kernels-") as name:
        store = KernelStore(name)
        cold = timed(lambda: build_kernel(layer, slug, private_key=private_key), repeats)
        digest = store.put(build_kernel(layer, slug, private_key=private_key))
        index = {kernel_key(layer, slug, None).hash: digest}
        trusted = signing.public_key(private_key)

        def load() -> None:
            found = index[kernel_key(layer, slug, None).hash]
            instantiate(open_kernel(store.get(found), found, trusted)[1], layer)

        row = Row(slug, median(cold), median(timed(load, repeats)))
    if blueprint.kind in (GraftKind.WRAP, GraftKind.OBSERVE):
        row.note = "computes nothing to speed up"
        return row
    try:
        _compiled(row, layer, slug, private_key)
        _torch_compile(row, layer, blueprint)
    except (CompilerMissingError, KernelBuildError) as error:
        row.note = str(error)[:80]
    return row


def _compiled(row: Row, layer: LayerInfo, slug: str, private_key: str) -> None:
    started = time.perf_counter()
    bundle = build_compiled(layer, slug, private_key=private_key)
    row.tier1_cold_s = time.perf_counter() - started
    trusted = signing.public_key(private_key)
    graft = instantiate(open_compiled(bundle.files, bundle.digest, trusted)[1], layer)
    loads = timed(lambda: load_compiled(bundle.files, bundle.digest, trusted), 3)
    row.tier1_load_ms = median(loads)
    compiled = load_compiled(bundle.files, bundle.digest, trusted)
    row.tier1_gain = try_compiled(graft, compiled, layer).speedup


def _torch_compile(row: Row, layer: LayerInfo, blueprint: Blueprint) -> None:
    x, y = sample(layer)

    def first_step() -> None:
        graft = blueprint.build(layer, seed=1)
        step = torch.compile(graft, fullgraph=True, dynamic=False)
        step(x, y).square().mean().backward()

    with tempfile.TemporaryDirectory(prefix="esper-kernels-") as name, inductor_in(Path(name)):
        torch._dynamo.reset()
        started = time.perf_counter()
        first_step()
        row.compile_cold_s = time.perf_counter() - started
        torch._dynamo.reset()
        started = time.perf_counter()
        first_step()
        row.compile_warm_ms = (time.perf_counter() - started) * 1e3


def pool(workers: int, *, kernels: int) -> float:
    """Kernels of tier 0 a second, from warm processes; every kernel has a key of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_start_worker) as processes:
        processes.map(_build_one, range(workers * 2), chunksize=1)  # all processes have started
        started = time.perf_counter()
        processes.map(_build_one, range(kernels), chunksize=1)
        return kernels / (time.perf_counter() - started)


def _start_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warm_up()


def _build_one(number: int) -> None:
    layers = [(layer, blueprint) for layer, blueprint in fitting() if blueprint.slug in QUICK]
    layer, blueprint = layers[number % len(layers)]
    build_kernel(layer, blueprint.slug, private_key=signing.generate_private_key(), seed=number + 1)


HEAD = (
    f"{'blueprint':<20}{'cold ms':>9}{'cached ms':>11}{'tier 1 s':>10}{'load ms':>9}{'gain':>7}"
    f"{'compile s':>11}{'warm ms':>9}  note"
)


def _line(row: Row) -> str:
    def shown(value: float | None, width: int) -> str:
        return f"{'-' if value is None else format(value, '.3g'):>{width}}"

    return (
        f"{row.blueprint:<20}{shown(row.cold_ms, 9)}{shown(row.cached_ms, 11)}"
        f"{shown(row.tier1_cold_s, 10)}{shown(row.tier1_load_ms, 9)}{shown(row.tier1_gain, 7)}"
        f"{shown(row.compile_cold_s, 11)}{shown(row.compile_warm_ms, 9)}  {row.note}"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
