"""Chooses the learning rates of the nets, on seeds that no report uses.

    python -m benchmarks.benefit.tuning [--seeds 0:3]

The rate of a net is the one of the grid whose loss at the end is lowest in the mean over seeds, as
a share of the lowest loss of each seed.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.benefit.hosts import ADDED, GRID, NARROW, WIDE, Host, rows_of
from benchmarks.benefit.training import Run, level

SMALL_STEPS, LARGE_STEPS = 2_500, 1_500


def losses(host: Host, extra: int, seed: int) -> list[float]:
    """At the end, of each rate of the grid."""
    steps = LARGE_STEPS if extra else SMALL_STEPS
    found = []
    for rate in GRID:
        run = Run.new(host, rows_of(host, seed, steps), seed, rate, extra)
        run.train(steps)
        found.append(level(run.curve))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0:3", help="first:end")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, end = map(int, options.seeds.split(":"))
    for host in (*NARROW, *WIDE):
        for name, extra in (("small", 0), ("large", ADDED)):
            found = np.array([losses(host, extra, seed) for seed in range(first, end)])
            shares = (found / found.min(1, keepdims=True)).mean(0)
            print(f"{host.name:16}{name:8}{GRID[int(shares.argmin())]:<8g}{shares}", flush=True)


if __name__ == "__main__":
    main()
