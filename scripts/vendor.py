"""Fetch the browser libraries into ``static/vendor``, and check that they are unchanged.

python scripts/vendor.py            download with npm, check npm's own integrity, write
python scripts/vendor.py --check    offline: hash what is there; unlisted files are an error
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR_DIR = Path(__file__).resolve().parents[1] / "static" / "vendor"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Library:
    """A package of the npm registry and the few files of it that browsers get."""

    name: str
    version: str
    licence: str  # SPDX
    members: tuple[str, ...]  # paths inside the tarball, without "package/"


LIBRARIES = (
    Library("htmx.org", "2.0.11", "0BSD", ("dist/htmx.min.js", "LICENSE")),
    Library("idiomorph", "0.8.0", "0BSD", ("dist/idiomorph-ext.min.js", "LICENSE")),
    Library("uplot", "1.6.32", "MIT", ("dist/uPlot.iife.min.js", "dist/uPlot.min.css", "LICENSE")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only verify, offline")
    if parser.parse_args().check:
        problems = check(VENDOR_DIR)
        for problem in problems:
            print(problem, file=sys.stderr)
        return 1 if problems else 0
    entries = [entry for library in LIBRARIES for entry in fetch(library, VENDOR_DIR)]
    text = json.dumps({"files": entries}, indent=2) + "\n"
    (VENDOR_DIR / MANIFEST).write_text(text, encoding="utf-8")
    return 0


def fetch(library: Library, target: Path) -> list[dict[str, str]]:
    """Pack one library, write its files, and describe them. npm verifies the tarball's sha512."""
    with tempfile.TemporaryDirectory() as directory:
        tarball = _pack(library, Path(directory))
        with tarfile.open(tarball) as archive:
            return [_extract(library, member, archive, target) for member in library.members]


def _pack(library: Library, directory: Path) -> Path:
    spec = f"{library.name}@{library.version}"
    subprocess.run(
        ["npm", "pack", spec, "--pack-destination", str(directory), "--silent"],  # noqa: S607
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
    return next(directory.glob("*.tgz"))


def _extract(
    library: Library, member: str, archive: tarfile.TarFile, target: Path
) -> dict[str, str]:
    stream = archive.extractfile(f"package/{member}")
    if stream is None:
        raise FileNotFoundError(f"{library.name} {library.version} has no {member}")
    content = stream.read()
    path = Path(library.name) / library.version / Path(member).name
    (target / path).parent.mkdir(parents=True, exist_ok=True)
    (target / path).write_bytes(content)
    return {
        "path": path.as_posix(),
        "name": library.name,
        "version": library.version,
        "licence": library.licence,
        "member": member,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def check(directory: Path) -> list[str]:
    """The differences between the manifest and the files; empty when there are none."""
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    listed = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    present = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    problems = [f"{path}: not in the manifest" for path in sorted(present - listed.keys())]
    problems += [f"{path}: missing" for path in sorted(listed.keys() - present)]
    for path in sorted(present & listed.keys()):
        if hashlib.sha256((directory / path).read_bytes()).hexdigest() != listed[path]:
            problems.append(f"{path}: was changed")
    return problems


if __name__ == "__main__":
    sys.exit(main())
