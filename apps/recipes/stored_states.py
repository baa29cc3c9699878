"""The checkpoints of a launch on its host: which there are, and a copy of one for a branch.

A stored state is a file or a folder in the launch's checkpoint folder whose name ends with its
step, as training scripts and frameworks name them: ``step-400.pt``, ``checkpoint-400``,
``epoch=3-step=400.ckpt``. Nothing of its content is loaded here: it belongs to a user's script.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from apps.recipes.files import RecipeError

MOST_STATES = 50  # of one launch; the newest
MAX_NAME = 200
_STEP = re.compile(r"(?:^|[^0-9])([0-9]{1,15})(?:\.[A-Za-z]+)*$")
_UNFINISHED = (".new", ".tmp", ".part", ".partial")
_CHUNK_BYTES = 8 << 20
_ZIP = b"PK\x03\x04"  # how torch.save begins its files


@dataclass(frozen=True, slots=True)
class Found:
    """A stored state on this host."""

    name: str
    step: int
    size_bytes: int
    written_at: datetime


def find_states(folder: Path) -> list[Found]:
    """The states in a checkpoint folder, the newest step first; none where it does not exist."""
    try:
        entries = [entry for entry in os.scandir(folder) if _step_of(entry.name) is not None]
    except OSError:
        return []
    found = []
    for entry in entries:
        try:
            found.append(_describe(entry))
        except OSError:  # the script has removed it meanwhile
            continue
    known = [state for state in found if state is not None]
    return sorted(known, key=lambda state: (-state.step, state.name))[:MOST_STATES]


def _step_of(name: str) -> int | None:
    """The step in a name; None: it names no state."""
    plain = not any(unicodedata.category(char).startswith("C") for char in name)
    if name.startswith(".") or name.endswith(_UNFINISHED) or len(name) > MAX_NAME or not plain:
        return None
    found = _STEP.search(name)
    return int(found[1]) if found else None


def _describe(entry: os.DirEntry[str]) -> Found | None:
    step = _step_of(entry.name)
    assert step is not None
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode):
        size, written = status.st_size, status.st_mtime
    elif stat.S_ISDIR(status.st_mode):
        parts = [path.lstat() for path in Path(entry.path).rglob("*")]
        size = sum(part.st_size for part in parts if stat.S_ISREG(part.st_mode))
        written = max([status.st_mtime, *(part.st_mtime for part in parts)])
    else:  # a link may lead anywhere
        return None
    return Found(entry.name, step, size, datetime.fromtimestamp(written, UTC)) if size else None


def copy_state(folder: Path, name: str, target: Path, progress: Callable[[], None]) -> str:
    """Copy a state into the folder ``target``, whole or not at all; returns its SHA-256.

    Args:
        progress: is called after each piece, so that a large copy is not taken for a dead one.

    Raises:
        RecipeError: it is not there, it is damaged, or a link is in it.
        OSError: the disk is full.
    """
    source = folder / name
    if _step_of(name) is None or Path(name).name != name or source.is_symlink():
        raise RecipeError(f"{name!r} is no stored state")
    fresh = target.with_name(f"{target.name}.new")
    for old in (fresh, target):
        shutil.rmtree(old, ignore_errors=True)
    fresh.mkdir(parents=True, mode=0o700)
    try:
        digest = _copied(source, fresh / name, progress)
    except FileNotFoundError as error:
        raise RecipeError(
            f"the stored state {name} is not on this host any more; branch from another one"
        ) from error
    fresh.replace(target)
    return digest


def _copied(source: Path, target: Path, progress: Callable[[], None]) -> str:
    if not source.is_dir():
        return _copy_file(source, target, progress)
    whole = hashlib.sha256()
    target.mkdir()
    for path in _files(source):
        inside = path.relative_to(source)
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        whole.update(
            f"{inside.as_posix()}\0{_copy_file(path, target / inside, progress)}\0".encode()
        )
    return whole.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            yield path
        elif not stat.S_ISDIR(mode):
            raise RecipeError(f"{path.name} in the stored state {folder.name} is a link")


def _copy_file(source: Path, target: Path, progress: Callable[[], None]) -> str:
    """An open file stays whole when the script replaces it by a rename."""
    digest = hashlib.sha256()
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as reading, target.open("xb") as writing:
        while piece := reading.read(_CHUNK_BYTES):
            digest.update(piece)
            writing.write(piece)
            progress()
    _check(target, source.name)
    return digest.hexdigest()


def _check(path: Path, name: str) -> None:
    """What is cut off or altered on the disk is told here, and not by a trainer's traceback."""
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
    if not start:
        raise RecipeError(f"the stored state {name} is damaged: it is empty")
    if start != _ZIP:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise RecipeError(f"the stored state {name} is damaged: {error}") from error
    if broken is not None:
        raise RecipeError(f"the stored state {name} is damaged: {broken} has a wrong checksum")
