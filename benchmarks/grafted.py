"""A compiled model with one graft, against the same model written by hand with that branch.

    python -m benchmarks.grafted [--quick] [--steps N] [--device cuda] [--dtype bf16] [--cpu-time]
                                 [--json FILE]

GPT-2 (124 M parameters on a GPU, smaller on a CPU), compiled as a whole and block by block, with
``fullgraph=True``. One model has a low-rank branch in its source, and its optimizer trains it; the
other one is attached, and got the same branch as a graft after it was compiled. Both train in
turns, step by step, in one run: the figures are of pairs of neighbouring steps. On a GPU the loop
runs free, so that pairs are of blocks of steps, from an idle device to an idle device. The columns
on the right do not depend on time: both must be equal.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.nn import functional as F

import esper
from benchmarks.overhead import Host, gpt_host
from benchmarks.place import Place, add_options, place_of
from esper.blueprints.catalog.proj_lora_64 import DEFAULT_ALPHA, MAX_RANK

BUDGET_RATIO = 1.05
LAYER = "blocks.1.c_fc"
BLUEPRINT = "proj_lora_64"
WARM_UP = 60  # steps: behind the first step at which Esper sets its periods by their cost
STEPS_OF_BLOCK = 10  # on a GPU


class LowRankByHand(nn.Module):
    """A layer with a low-rank branch, as a user would write it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        rank = min(MAX_RANK, min(layer.in_features, layer.out_features) // 4)
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(rank))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.scaling = DEFAULT_ALPHA / math.sqrt(rank)

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.down), self.up)
        y: Tensor = self.layer(x) + self.scaling * change
        return y


@dataclass(slots=True)
class Compiled:
    """What torch.compile has made for one model, without regard to time."""

    graph_breaks: int
    recompiles: int
    kernels: int


@dataclass(eq=False)
class Training:
    """A compiled model in training, and its steps."""

    host: Host
    place: Place
    by_block: bool
    grafted: bool
    model: nn.Module = field(init=False)
    session: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.host.build()
        if not self.grafted:
            _replace(self.model, LAYER, LowRankByHand)
        self.model = self.place.put(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        if self.grafted:
            self.session = esper.attach(
                self.model, self.optimizer, mode="supervised", verbose=False, server=""
            )
        self.call: Callable[..., Tensor] = self.model
        if self.by_block:
            for block in self.model.get_submodule("blocks").children():
                block.compile(fullgraph=True)
        else:
            self.call = torch.compile(self.model, fullgraph=True)
        self.batch = self.place.batch(self.host.batch())

    def warm_up(self) -> Compiled:
        """Compiles everything, and returns what was made of the model with its branch."""
        breaks, metrics.generated_kernel_count = _graph_breaks(), 0
        self.train(3)
        if self.grafted:
            if not self.by_block:  # the code without the graft is no part of the comparison
                metrics.generated_kernel_count = 0
            self.session.graft(LAYER, BLUEPRINT)
        self.train(3)
        kernels, before = metrics.generated_kernel_count, _graphs()
        self.train(WARM_UP)
        return Compiled(_graph_breaks() - breaks, _graphs() - before, kernels)

    def block(self) -> float:
        """Milliseconds of a step; on a GPU, the mean of a few."""
        steps = STEPS_OF_BLOCK if self.place.is_gpu else 1
        self.place.finish()
        started = self.place.now()
        self.train(steps)
        self.place.finish()
        return (self.place.now() - started) * 1e3 / steps

    def train(self, steps: int) -> None:
        for _ in range(steps):
            with self.place.precision():
                loss = F.cross_entropy(self.call(self.batch[0]), self.batch[1])
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            if self.session is not None:
                self.session.step(loss)

    def close(self) -> None:
        if self.session is not None:
            self.session.close()


def _replace(model: nn.Module, name: str, around: Callable[[nn.Linear], nn.Module]) -> None:
    parent, _, last = name.rpartition(".")
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    setattr(model.get_submodule(parent), last, around(layer))


def _graph_breaks() -> int:
    return sum(counters["graph_break"].values())


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def measure(place: Place, *, by_block: bool, pairs: int) -> dict[str, Any]:
    """Step times of the two models in one run, and what was compiled for each."""
    torch.set_num_threads(1)
    torch.compiler.reset()
    host = gpt_host(place.device)
    # Both are variants of one code, and kernels that come out of the cache are not counted.
    with (
        torch._dynamo.config.patch(recompile_limit=32),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        hand = Training(host, place, by_block, grafted=False)
        ours = Training(host, place, by_block, grafted=True)
        made = {"hand": hand.warm_up(), "grafted": ours.warm_up()}
        times: dict[str, list[float]] = {"hand": [], "grafted": []}
        for pair in range(pairs):
            # In turns, so that neither always comes after the other.
            order = [("hand", hand), ("grafted", ours)]
            for name, training in order if pair % 2 else reversed(order):
                times[name].append(training.block())
        ours.close()
    ratios = [b / a for a, b in zip(times["hand"], times["grafted"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "compiled": "block by block" if by_block else "as a whole",
        "hand_p50": statistics.median(times["hand"]),
        "grafted_p50": statistics.median(times["grafted"]),
        "ratio": ratio,
        "mean_ratio": statistics.fmean(times["grafted"]) / statistics.fmean(times["hand"]),
        "pairs": pairs,
        "budget": f"<= {BUDGET_RATIO} x by hand",
        "kept": ratio <= BUDGET_RATIO,
        **{
            f"{name}_{what}": getattr(compiled, what)
            for name, compiled in made.items()
            for what in ("graph_breaks", "recompiles", "kernels")
        },
    }


def show(rows: list[dict[str, Any]]) -> str:
    """A table for a terminal."""
    lines = [
        f"{'compiled':16}{'by hand':>9}{'grafted':>9}{'p50 ratio':>11}{'mean ratio':>12}"
        f"{'breaks':>9}{'recompiles':>12}{'kernels':>10}  budget"
    ]
    for row in rows:
        pair = {
            what: f"{row[f'hand_{what}']}, {row[f'grafted_{what}']}"
            for what in ("graph_breaks", "recompiles", "kernels")
        }
        lines.append(
            f"{row['compiled']:16}{row['hand_p50']:>9.3f}{row['grafted_p50']:>9.3f}"
            f"{row['ratio']:>11.4f}{row['mean_ratio']:>12.4f}{pair['graph_breaks']:>9}"
            f"{pair['recompiles']:>12}{pair['kernels']:>10}"
            f"  {row['budget']}: {'kept' if row['kept'] else 'NOT KEPT'}"
        )
    return "\n".join([*lines, "milliseconds a step; pairs of values: by hand, grafted"])


def _parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer pairs of steps")
    parser.add_argument("--pairs", type=int, help="pairs of steps; on a GPU, of blocks of steps")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    place = place_of(options)
    pairs = options.pairs or (100 if options.quick else 400)
    rows = [measure(place, by_block=by_block, pairs=pairs) for by_block in (False, True)]
    print(show(rows), place, sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": str(place), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
