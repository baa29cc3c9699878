"""Write ``requirements/web.lock.txt``: web.txt with the hashes of its wheels, for docker/.

python -m scripts.requirement_hashes            ask the package index, write
python -m scripts.requirement_hashes --check    offline: exit 1 where the two name other versions

The image of the web process is built with ``pip install --require-hashes``. The hashes are those of
the wheels for CPython 3.11 on Linux, x86-64 and ARM. Requirements with torch have none: its wheel
depends on the index, CPU or CUDA, that an installation chooses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "requirements"
SOURCE, LOCK = FOLDER / "web.txt", FOLDER / "web.lock.txt"
MACHINES = ("x86_64", "aarch64")
GLIBC = ("manylinux_2_34", "manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux_2_5")
HEAD = "# Written by python -m scripts.requirement_hashes from web.txt.\n"


def pins(text: str) -> list[str]:
    """``name==version`` of each line."""
    lines = (line.partition("#")[0].strip(" \\") for line in text.splitlines())
    return [line.partition(";")[0].strip().lower() for line in lines if "==" in line]


def hashes(machine: str) -> dict[str, str]:
    """Pin -> SHA-256 of its wheel for this kind of machine, as pip resolves it."""
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.json"
        platforms = [part for glibc in GLIBC for part in ("--platform", f"{glibc}_{machine}")]
        command = (
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"),
            *("--no-deps", "--only-binary=:all:", "--python-version", "3.11", *platforms),
            *("--implementation", "cp", "--target", name, "--quiet"),
            *("--report", str(report), "-r", str(SOURCE)),
        )
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    return {
        _pin(entry["metadata"]): entry["download_info"]["archive_info"]["hashes"]["sha256"]
        for entry in found
    }


def _pin(metadata: dict[str, str]) -> str:
    return f"{metadata['name'].lower().replace('_', '-').replace('.', '-')}=={metadata['version']}"


def lock() -> str:
    """The whole file."""
    of_pin: dict[str, set[str]] = defaultdict(set)
    for machine in MACHINES:
        for pin, digest in hashes(machine).items():
            of_pin[pin].add(digest)
    lines = [
        " \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in sorted(of_pin[pin]))])
        for pin in pins(SOURCE.read_text(encoding="utf-8"))
    ]
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="ask nobody, compare the versions")
    if parser.parse_args().check:
        theirs = pins(LOCK.read_text(encoding="utf-8"))
        return int(theirs != pins(SOURCE.read_text(encoding="utf-8")))
    LOCK.write_text(lock(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
