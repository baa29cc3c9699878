"""What being watched costs a training step.

    python -m benchmarks.overhead [--quick] [--json FILE]

Each host model is trained bare and attached in turns, in interleaved blocks of the same run, so
that the machine's drift hits both alike. Attached means observing with telemetry to a server that
does not answer: the busiest case that a trainer meets by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper

LONG_STEP_MS = 10.0  # from here on the budget is a ratio, below it is absolute
BUDGET_RATIO = 1.01
BUDGET_ABSOLUTE_MS = 0.1


@dataclass(frozen=True)
class Host:
    """A model, its optimizer and how to get a loss."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


def perceptron() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def convolutions() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


HOSTS = (
    Host(
        "short steps: 5-layer perceptron",
        perceptron,
        lambda: (torch.randn(64, 128), torch.randint(10, (64,))),
    ),
    Host(
        "20 ms steps: 4 convolutions",
        convolutions,
        lambda: (torch.randn(10, 3, 32, 32), torch.randint(10, (10,))),
    ),
)


class Loop:
    """One training loop; ``session`` is None for the bare one."""

    def __init__(self, host: Host, *, attached: bool) -> None:
        torch.manual_seed(0)
        self.model = host.build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = host.batch()
        self.session = _attach(self.model, self.optimizer) if attached else None

    def block(self, steps: int) -> list[float]:
        """Milliseconds of each step."""
        return [self._step() for _ in range(steps)]

    def _step(self) -> float:
        started = time.perf_counter()
        loss = F.cross_entropy(self.model(self.batch[0]), self.batch[1])
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        if self.session is not None:
            self.session.step(loss)
        return (time.perf_counter() - started) * 1e3


def _attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> esper.Session:
    nobody = "http://127.0.0.1:9"
    return esper.attach(model, optimizer, run="overhead", server=nobody, token="esp_x")  # noqa: S106


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single steps, block by block, bare and attached in turns."""

    bare: list[list[float]]
    attached: list[list[float]]

    @property
    def ratios(self) -> list[float]:
        """Attached / bare median of each pair of neighbouring blocks."""
        return [
            statistics.median(watched) / statistics.median(bare)
            for bare, watched in zip(self.bare, self.attached, strict=True)
        ]


def measure(*, quick: bool = False) -> dict[str, dict[str, Any]]:
    """Step times of every host, bare and attached.

    Returns:
        By host: p50, p95 and p99 of the attached step, the bare p50, the ratio, the absolute
        difference of the medians, the mean difference, the budget and whether it is kept.
    """
    return {host.name: _summary(_time(host, quick=quick)) for host in HOSTS}


def step_time_ratios(*, quick: bool = False) -> list[float]:
    """Attached / bare step time on the host with 20 ms steps, one number per pair of blocks."""
    return _time(HOSTS[-1], quick=quick).ratios


def _time(host: Host, *, quick: bool) -> Timing:
    torch.set_num_threads(1)
    bare, attached = Loop(host, attached=False), Loop(host, attached=True)
    steps = max(5, int(50 / statistics.median(bare.block(30))))
    attached.block(30)
    timing = Timing([], [])
    end = time.monotonic() + (8.0 if quick else 60.0)
    while time.monotonic() < end:
        timing.bare.append(bare.block(steps))
        timing.attached.append(attached.block(steps))
    assert attached.session is not None
    attached.session.close(timeout=0.1)
    return timing


def _summary(timing: Timing) -> dict[str, Any]:
    bare_ms = [step for block in timing.bare for step in block]
    attached_ms = [step for block in timing.attached for step in block]
    bare = statistics.median(bare_ms)
    is_long = bare >= LONG_STEP_MS
    # Of pairs of neighbouring blocks: the machine's slow drift falls out.
    ratio = statistics.median(timing.ratios)
    more = bare * (ratio - 1.0)
    return {
        "p50": statistics.median(attached_ms),
        "p95": _percentile(attached_ms, 0.95),
        "p99": _percentile(attached_ms, 0.99),
        "bare_p50": bare,
        "ratio": ratio,
        "absolute_ms": more,
        "mean_difference_ms": statistics.fmean(attached_ms) - statistics.fmean(bare_ms),
        "unit": "ms",
        "budget": f"<= {BUDGET_RATIO} x bare" if is_long else f"<= {BUDGET_ABSOLUTE_MS} ms more",
        "kept": ratio <= BUDGET_RATIO if is_long else more <= BUDGET_ABSOLUTE_MS,
        "n": len(attached_ms),
    }


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def print_table(results: dict[str, dict[str, Any]]) -> None:
    head = f"{'host':34} {'bare':>9} {'attached':>9} {'ratio':>7} {'more':>9} {'mean':>9}  budget"
    print(head)
    for name, row in results.items():
        print(
            f"{name:34} {row['bare_p50']:6.3f} ms {row['p50']:6.3f} ms {row['ratio']:7.4f} "
            f"{row['absolute_ms']:6.3f} ms {row['mean_difference_ms']:6.3f} ms  {row['budget']}: "
            f"{'kept' if row['kept'] else 'NOT KEPT'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="What being watched costs a training step.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = measure(quick=args.quick)
    print_table(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
