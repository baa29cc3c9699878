"""Kernels by content, on disk: ``<first two digits>/<digest>/<file>``. Imports no torch.

:class:`Store` is the interface of all stores; ``esper.compilation.object_store`` has another one.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from esper.compilation.verify import check_digest
from esper.contracts import BUNDLE_FILES, KernelBundle
from esper.contracts.kernels import CODE_FILE, COMPILED_FILES, size_limit
from esper.exceptions import KernelDigestError, KernelError


class Store(Protocol):
    """A store of kernels, named by digest. Returned kernels are always unverified.

    ``get`` raises ``KernelError`` for a missing kernel and ``KernelDigestError`` for one that
    cannot be read; every method raises ``StoreUnavailableError`` if the store does not answer.
    """

    def has(self, digest: str) -> bool: ...

    def put(self, bundle: KernelBundle) -> str: ...

    def get(self, digest: str) -> dict[str, bytes]: ...

    def remove(self, digest: str) -> bool: ...

    def set_aside(self, digest: str) -> bool:
        """Moves a corrupt kernel out of use, so that a person can inspect it."""
        ...

    def list(self) -> tuple[str, ...]: ...


class KernelStore:
    """Kernels in a directory; safe for many processes, because one rename adds a kernel.

    Args:
        directory: created if missing.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """The kernel's path; raises ``KernelDigestError`` for a bad digest."""
        return self.directory / check_digest(digest)[:2] / digest

    def has(self, digest: str) -> bool:
        return self.path(digest).is_dir()

    def put(self, bundle: KernelBundle) -> str:
        """Stores all files or none; storing a kernel again does nothing.

        Returns:
            The kernel's digest.
        """
        check_file_names(bundle)
        digest = bundle.digest
        _place(bundle.files, self.path(digest), self.directory)
        return digest

    def get(self, digest: str) -> dict[str, bytes]:
        """The kernel's files, unverified; ``open_kernel`` verifies them.

        Raises:
            KernelError: there is no such kernel.
            KernelDigestError: the digest is malformed, or a file is missing or too large.
        """
        directory = self.path(digest)
        if not directory.is_dir():
            raise KernelError(f"there is no kernel {digest}", digest=digest)
        compiled = (directory / CODE_FILE).exists()
        names = COMPILED_FILES if compiled else BUNDLE_FILES
        return {name: _read(directory / name, digest) for name in names}

    def remove(self, digest: str) -> bool:
        """Removes a kernel; False if there was none."""
        trash = self.directory / f".trash-{secrets.token_hex(8)}"
        try:
            self.path(digest).rename(trash)
        except FileNotFoundError:
            return False
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def set_aside(self, digest: str) -> bool:
        """Moves a kernel to ``corrupt/``; False if there was none."""
        corner = self.directory / "corrupt"
        corner.mkdir(exist_ok=True)
        try:
            self.path(digest).rename(corner / f"{digest}.{secrets.token_hex(4)}")
        except FileNotFoundError:
            return False
        return True

    def trim(self, most_bytes: int, *, keep: Collection[str] = ()) -> tuple[str, ...]:
        """Removes the least recently used kernels until the rest fits; for a copy of a store.

        Args:
            keep: digests that are never removed.

        Returns:
            The removed digests.
        """
        ages = sorted((self.path(d).stat().st_mtime, d) for d in self.list())
        sizes = {d: _size(self.path(d)) for _, d in ages}
        total, gone = sum(sizes.values()), []
        for _, digest in ages:
            if total > most_bytes and digest not in keep and self.remove(digest):
                total -= sizes[digest]
                gone.append(digest)
        return tuple(gone)

    def touch(self, digest: str) -> None:
        """Records that a kernel was used now."""
        with suppress(FileNotFoundError):
            os.utime(self.path(digest))

    def list(self) -> tuple[str, ...]:
        """All digests, sorted."""
        return tuple(sorted(path.name for path in self.directory.glob("[0-9a-f][0-9a-f]/*")))


def stage(files: Mapping[str, bytes], digest: str, stage_dir: str | os.PathLike[str]) -> Path:
    """Copies a kernel to ``<stage_dir>/<digest>/``, where a trainer on this host looks first.

    Returns:
        The directory with its files.
    """
    root = Path(stage_dir)
    root.mkdir(parents=True, exist_ok=True)
    _place(files, root / check_digest(digest), root)
    return root / digest


def check_file_names(bundle: KernelBundle) -> None:
    """Raises ``KernelError`` for missing or unexpected files."""
    if set(bundle.files) not in (set(BUNDLE_FILES), set(COMPILED_FILES)):
        raise KernelError(f"a kernel has the files {', '.join(BUNDLE_FILES)}, maybe {CODE_FILE}")


def _place(files: Mapping[str, bytes], target: Path, scratch: Path) -> None:
    """Writes into a new directory beside the target and renames it."""
    if target.is_dir():
        return
    incoming = scratch / f".incoming-{os.getpid()}-{secrets.token_hex(8)}"
    incoming.mkdir(mode=0o755)
    try:
        for name, data in files.items():
            _write(incoming / name, data)
        target.parent.mkdir(exist_ok=True)
        incoming.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _read(path: Path, digest: str) -> bytes:
    try:
        # With a link, anyone who can write to the store could choose which file is read.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise KernelDigestError(f"{path.name} cannot be read: {error}", digest=digest) from error
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(size_limit(path.name) + 1)
    if len(data) > size_limit(path.name):
        raise KernelDigestError(f"{path.name} is too large", digest=digest)
    return data
