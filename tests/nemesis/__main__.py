"""``python -m tests.nemesis``: the long campaign; ``--write`` puts its result on the page.

python -m tests.nemesis                       300 adaptations, at least 20 minutes
python -m tests.nemesis --seconds 60 --adaptations 20
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.nemesis.campaign import Plan, run_campaign
from tests.nemesis.page import write_section
from tests.nemesis.report import describe
from tests.nemesis.soak import describe_growth


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--adaptations", type=int, default=300)
    parser.add_argument("--fake", type=int, default=8, help="trainers without a model")
    parser.add_argument("--real", type=int, default=1, help="trainers with one")
    parser.add_argument("--pause", type=float, default=1.5, help="seconds between two faults")
    parser.add_argument("--proposers", type=int, default=4, help="so many propose at once")
    parser.add_argument("--patience", type=float, default=240, help="seconds for all ends")
    parser.add_argument("--folder", type=Path, help="keep logs and ledgers there")
    parser.add_argument("--soak", action="store_true", help="mild faults; measure growth")
    parser.add_argument("--write", action="store_true", help="write the result to the page")
    return parser.parse_args()


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 256 MiB for the data directory, where one can be mounted."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    mount = ("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(data))
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield data
    finally:
        subprocess.run(["umount", "--lazy", str(data)], check=True)


def main() -> int:
    arguments = _parse()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="esper-nemesis-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"logs, ledgers and journals are in {folder}", flush=True)
    plan = Plan(
        seed=arguments.seed,
        seconds=arguments.seconds,
        adaptations=arguments.adaptations,
        fake=arguments.fake,
        real=arguments.real,
        pause=arguments.pause,
        patience=arguments.patience,
        proposers=arguments.proposers,
        mild=arguments.soak,
    )
    with _small_disk(folder) as disk:
        result = run_campaign(folder, plan, disk)
    text = describe(result)
    if arguments.soak:
        text += "\n\n" + describe_growth(result.samples, result.seconds)
    print(text)
    if arguments.write:
        write_section("soak" if arguments.soak else "nemesis", text)
    return 1 if result.violations or result.errors else 0


if __name__ == "__main__":
    sys.exit(main())
