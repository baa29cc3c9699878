"""Does it pay? Esper against what its cost would buy otherwise.

    python -m benchmarks.benefit [--quick] [--seeds 100:110] [--minutes 60] [--json FILE]
                                 [--records FILE ...] [--document docs/benefit.md]

The tracks are a *sunk run*, a run *from scratch*, *adapters*, and what an *idle* Esper costs. Rates
were chosen by :mod:`benchmarks.benefit.tuning` on seeds 0 to 2; the seeds from 100 on are for
reports. Seed by seed through all hosts, so that a run that is cut short has some of each.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.benefit import adapters, idle, narrow, report
from benchmarks.benefit.hosts import NARROW, WIDE

PARTS = ("idle", "narrow", "wide", "adapters")
PAIRS = 100  # blocks of steps with an idle Esper, and without


@dataclass
class Results:
    """All that was measured."""

    records: list[narrow.Record] = field(default_factory=list)
    placed: list[adapters.Placed] = field(default_factory=list)
    idle: list[idle.Idle] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    about: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, paths: list[Path]) -> Results:
        found = cls()
        for path in paths:
            saved = json.loads(path.read_text())
            found.records += [narrow.Record(**entry) for entry in saved["records"]]
            found.placed += [adapters.Placed(**entry) for entry in saved["placed"]]
            found.idle += [idle.Idle(**entry) for entry in saved["idle"]]
            found.same += saved["same"]
            found.about += saved["about"]
        return found


def run(options: argparse.Namespace) -> Iterator[Results]:
    """What is known after each part."""
    first, end = map(int, options.seeds.split(":"))
    seeds = range(first, first + 1) if options.quick else range(first, end)
    parts = options.parts.split(",")
    deadline = time.monotonic() + 60 * options.minutes
    known = options.json is not None and options.json.exists()
    found = Results.load([options.json]) if known else Results()
    done = {(record.host, record.seed) for record in found.records}
    done |= {(placed.task, placed.seed) for placed in found.placed}
    if "idle" in parts and not found.idle:
        found.idle = idle.measure(PAIRS // (10 if options.quick else 1))
        found.same = [idle.same_to_the_bit(seed) for seed in seeds[:3]]
        yield found
    for seed in seeds:
        for host in NARROW if "narrow" in parts else ():
            if time.monotonic() < deadline and (host.name, seed) not in done:
                found.records.append(narrow.measure(host, seed))
                yield found
        for host in WIDE if "wide" in parts else ():
            if time.monotonic() < deadline and (host.name, seed) not in done:
                found.records.append(narrow.measure_wide(host, seed))
                yield found
        for task in adapters.TASKS if "adapters" in parts else ():
            if time.monotonic() < deadline and (task.host.name, seed) not in done:
                found.placed.append(adapters.measure(task, seed))
                yield found


def commit() -> str:
    """Of the code that is loaded, so it is asked for at the start."""
    git = shutil.which("git") or "git"
    found = subprocess.run(
        [git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def about(start: str, seeds: str, parts: str, seconds: float) -> str:
    """What was run, where."""
    return (
        f"Commit {start}, {parts}, seeds {seeds}, {seconds / 60:.0f} minutes, "
        f"torch {torch.__version__}, {platform.machine()}, one thread."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", default="100:110", help="first:end")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="nothing new after these")
    parser.add_argument(
        "--json", type=Path, help="where the results go; a run that was cut short goes on"
    )
    parser.add_argument("--records", type=Path, nargs="+", help="report these, and run nothing")
    parser.add_argument(
        "--document", type=Path, help="write benefit.md; tracks that were not run are kept in it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("esper").setLevel(logging.CRITICAL)
    started, start, found = time.monotonic(), commit(), Results()
    if options.records:
        found = Results.load(options.records)
    else:
        known = options.json is not None and options.json.exists()
        before = Results.load([options.json]).about if known else []
        for found in run(options):
            seconds = time.monotonic() - started
            found.about = [*before, about(start, options.seeds, options.parts, seconds)]
            if options.json:
                options.json.write_text(json.dumps(asdict(found), indent=1))
            print(
                f"{seconds:6.0f} s  {len(found.records)} runs, {len(found.placed)} fits", flush=True
            )
    print("\n".join(report.lines(found.records, found.placed, found.idle, found.same)))
    if options.document:
        earlier = options.document.read_text() if options.document.exists() else ""
        options.document.write_text(
            report.document(
                found.records, found.placed, found.idle, found.same, found.about, earlier
            )
        )


if __name__ == "__main__":
    main()
