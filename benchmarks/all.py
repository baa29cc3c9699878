"""Every benchmark that needs no other package and no GPU, one after the other.

``python -m benchmarks.all [--quick] [--only NAME …] [--docs FOLDER]``

With ``--docs`` the tables go into the page ``performance.md`` of that folder, between the markers
of each benchmark, with the machine and its load; what stands around them stays. A benchmark that
fails is named at the end, and its old table stays.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.installation import machine

PAGE = "performance.md"


@dataclass(frozen=True)
class Benchmark:
    """A module of ``benchmarks``, and the arguments of its short and its long run."""

    module: str
    quick: tuple[str, ...] = ("--quick",)
    whole: tuple[str, ...] = ()

    def command(self, *, quick: bool) -> list[str]:
        return ["python", "-m", f"benchmarks.{self.module}", *(self.quick if quick else self.whole)]


WATCHED = (
    *("--cpu-time", "--watcher", "esper", "supervised", "automatic"),
    *("--host", "perceptron", "transformer"),
)
BENCHMARKS = (
    Benchmark("latency"),
    Benchmark("ingest", ("--seconds", "6", "--approvals", "30")),
    Benchmark("sockets", ("--events", "15", "--approvals", "15")),
    Benchmark("pages", ("--quick", "--sizes", "1", "10")),
    Benchmark("flood", ("--seconds", "20", "--approvals", "20"), ("--seconds", "600")),
    Benchmark("overhead", ("--quick", *WATCHED), WATCHED),
    Benchmark("kernels"),
    Benchmark("recompile", ("--blocks", "2", "--width", "64"), ("--blocks", "2", "--width", "64")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns how many benchmarks failed."""
    options = _parse(arguments)
    failed = []
    for benchmark in BENCHMARKS:
        if options.only and benchmark.module not in options.only:
            continue
        command = benchmark.command(quick=options.quick)
        print(f"\n$ {' '.join(command)}", flush=True)
        done = subprocess.run(
            [sys.executable, *command[1:]], stdout=subprocess.PIPE, text=True, check=False
        )
        print(done.stdout, flush=True)
        if done.returncode:
            failed.append(benchmark.module)
        elif options.docs:
            page = options.docs / PAGE
            text = section(command, done.stdout, machine(), datetime.now(UTC))
            page.write_text(replaced(page.read_text(), benchmark.module, text))
    print(f"\n{machine()}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


def section(command: Sequence[str], output: str, where: str, at: datetime) -> str:
    """The command, what it printed and where, for a page."""
    lines = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
    return (
        f"```sh\n{' '.join(command)}\n```\n\n```text\n{lines}\n```\n\n"
        f"{at:%Y-%m-%d %H:%M} UTC on {where}."
    )


def replaced(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the markers of a benchmark; raises ``ValueError``."""
    begin, end = f"<!-- {name}: measured -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"{PAGE} must have {begin} and {end} once")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller sizes")
    names = [benchmark.module for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, help="these alone")
    parser.add_argument("--docs", type=Path, help="write the tables into performance.md there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
