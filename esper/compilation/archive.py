"""``inductor.tar``: names and bytes, nothing else. Imports no torch.

It is read in memory and written file by file, never extracted. Everything that tar supports beside
plain files (links, devices, owners, modes, sparse files, absolute names) is refused, so that no
entry can leave its target directory.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

from esper.contracts.kernels import MAX_CODE_BYTES
from esper.exceptions import KernelError

MAX_FILES = 512
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}){0,3}")


def pack_archive(files: Mapping[str, bytes]) -> bytes:
    """The files as an uncompressed tar; equal files give equal bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size = len(files[name])
            archive.addfile(entry, io.BytesIO(files[name]))
    return out.getvalue()


def unpack_archive(data: bytes) -> dict[str, bytes]:
    """Names and contents, in memory.

    Raises:
        KernelError: it is not a plain tar, or contains anything but a few plain files.
    """
    if len(data) > MAX_CODE_BYTES:
        raise KernelError(f"an archive of {len(data)} bytes, at most {MAX_CODE_BYTES} are accepted")
    files: dict[str, bytes] = {}
    try:
        # "r:" accepts no compression, so no entry is larger than the data.
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for entry in archive:
                _check_entry(entry, files)
                content = archive.extractfile(entry)
                assert content is not None  # a plain file has one
                files[entry.name] = content.read(MAX_CODE_BYTES)
                if len(files[entry.name]) != entry.size:
                    raise KernelError(f"{entry.name} is truncated in the archive")
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise KernelError(f"not a readable archive: {error}") from error
    return files


def write_files(files: Mapping[str, bytes], directory: Path) -> None:
    """Writes the files into a directory that no other user can write to."""
    for name, data in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with target.open("xb") as file:
            file.write(data)


def _check_entry(entry: tarfile.TarInfo, files: Mapping[str, bytes]) -> None:
    if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.issparse():
        raise KernelError(f"{entry.name[:80]!r} in the archive is not a plain file")
    if not _NAME.fullmatch(entry.name):
        raise KernelError(f"{entry.name[:80]!r} is not a valid name in an archive")
    if entry.name in files or len(files) >= MAX_FILES:
        raise KernelError("the archive has a duplicate name, or too many files")
    if entry.size > MAX_CODE_BYTES:
        raise KernelError(f"{entry.name} claims {entry.size} bytes")
