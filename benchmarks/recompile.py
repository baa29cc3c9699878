"""The pause of a graft into compiled code: compiled in the training thread, and compiled ahead.

    python -m benchmarks.recompile [--blocks 4] [--width 128] [--device cuda] [--json FILE]

One run, one transformer, compiled as a whole and then block by block. A graft goes into one layer
without preparation and is undone; then one goes into another layer after ``session.prepare``. Their
graphs are of about the same size, and the cache on disk begins empty. The pause is the time of the
graft and of the longest step after it, less a usual step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from benchmarks.place import machine_name

BLUEPRINT = "proj_lora_64"
STEPS_AFTER = 3  # the first compiles, the others show what is usual


class Block(nn.Module):
    """One block of a transformer, on [B, T, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, 3 * width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.read(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(query, key, value, is_causal=True)
        widened: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return x + widened


class Training:
    """A compiled transformer in training, attached."""

    def __init__(self, blocks: int, width: int, device: str, *, by_block: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Block(width) for _ in range(blocks))).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.session = esper.attach(
            self.model, self.optimizer, mode="supervised", verbose=False, server=""
        )
        self.run: Any = self.model
        if by_block:
            for block in self.model:
                block.compile()
        else:
            self.run = torch.compile(self.model)
        self.x = torch.randn(8, 64, width, device=device)

    def step(self) -> float:
        """One training step; seconds."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.run(self.x).square().mean()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.session.step(loss)
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def pause(self, act: Callable[[], object]) -> float:
        """Seconds that the training waits for ``act`` and the step after it."""
        usual = min(self.step() for _ in range(STEPS_AFTER))
        started = time.perf_counter()
        act()
        acted = time.perf_counter() - started
        return acted + max(self.step() for _ in range(STEPS_AFTER)) - usual


def measure(blocks: int, width: int, device: str, *, by_block: bool) -> dict[str, Any]:
    """Pauses in seconds, and the longest step while the process compiled, in usual steps."""
    torch.compiler.reset()
    training = Training(blocks, width, device, by_block=by_block)
    session = training.session
    for _ in range(STEPS_AFTER):
        training.step()
    receipts: list[Any] = []

    def graft(layer: str) -> Callable[[], None]:
        return lambda: receipts.append(session.graft(layer, BLUEPRINT))

    def undo() -> object:
        return session.undo(receipts.pop())

    cold = training.pause(graft("0.fc1"))
    cold_undo = training.pause(undo)
    usual = [training.step() for _ in range(20)]
    started, beside = time.perf_counter(), []
    while not session.prepare("1.fc2", BLUEPRINT):
        beside.append(training.step())
    prepared_in = time.perf_counter() - started
    forecast = session.forecast_pause("1.fc2", BLUEPRINT)
    ahead = training.pause(graft("1.fc2"))
    undone = training.pause(undo)
    session.close()
    median = statistics.median(usual)
    return {
        "compiled": "block by block" if by_block else "as a whole",
        "cold_s": cold,
        "ahead_s": ahead,
        "ratio": cold / ahead,
        "forecast_s": None if forecast is None else forecast.expected,
        "prepared": forecast is not None and forecast.prepared,
        "prepared_in_s": prepared_in,
        "undo_s": max(cold_undo, undone),
        "steps_beside": statistics.median(beside) / median if beside else None,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        rows = [
            measure(options.blocks, options.width, options.device, by_block=by_block)
            for by_block in (False, True)
        ]
    print("compiled         cold s  ahead s  ratio  forecast s  prepared s  undo s  steps beside")
    for row in rows:
        forecast = float("nan") if row["forecast_s"] is None else row["forecast_s"]
        beside = float("nan") if row["steps_beside"] is None else row["steps_beside"]
        note = "" if row["prepared"] else "  NOT PREPARED"
        print(
            f"{row['compiled']:15s} {row['cold_s']:7.2f} {row['ahead_s']:8.2f} {row['ratio']:6.1f}"
            f" {forecast:11.2f} {row['prepared_in_s']:11.1f} {row['undo_s']:7.2f}"
            f" {beside:10.2f} x{note}"
        )
    print(machine_name(options.device))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
