"""Where a benchmark runs: device, precision, compiled or not; and the machine's name."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Place:
    """Device and precision of all models of one run."""

    device: str = "cpu"
    dtype: str = "fp32"  # "bf16": autocast
    compiled: bool = False
    cpu_time: bool = False  # of the calling thread, for a busy machine

    def now(self) -> float:
        """Seconds; differences count."""
        return time.thread_time() if self.cpu_time else time.perf_counter()

    def put(self, model: nn.Module) -> nn.Module:
        """The model there, as it will be called."""
        return model.to(self.device)

    def call(self, model: nn.Module) -> Any:
        """What a script calls: the model, or its compiled form."""
        return torch.compile(model) if self.compiled else model

    def batch(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        return x.to(self.device), y.to(self.device)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def finish(self) -> None:
        """Waits for the device, so that a clock can be read."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def __str__(self) -> str:
        form = "compiled" if self.compiled else "eager"
        clock = "CPU time of the training thread" if self.cpu_time else "wall clock"
        place = f"{machine_name(self.device)}; {self.dtype}, {form}, torch {torch.__version__}"
        return f"{place}; {clock}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="train compiled models")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the CPU time of the training thread, where other programs keep the cores busy",
    )


def place_of(options: argparse.Namespace) -> Place:
    """Raises ``SystemExit`` where there is no such device."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device on this machine; leave out --device cuda")
    return Place(options.device, options.dtype, options.compile, options.cpu_time)


def machine_name(device: str) -> str:
    """Device, cores and present load: figures of different machines cannot be compared."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
