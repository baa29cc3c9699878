"""How much space a directory has, and from when on its disk counts as full."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

FULL_BELOW_MIB = 16  # SQLite, Valkey and a log line need a few MiB each


def nearest_existing(directory: Path) -> Path:
    """The directory, or the first of its parents that exists."""
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def free_mib(directory: Path) -> int:
    """MiB that this user may still write; 0 where the file system has no inode left."""
    existing = nearest_existing(directory)
    inodes = os.statvfs(existing)
    if inodes.f_files and not inodes.f_favail:
        return 0
    return shutil.disk_usage(existing).free // 2**20


def why_full(directory: Path) -> str:
    """A sentence when the disk is full, else empty."""
    free = free_mib(directory)
    if free >= FULL_BELOW_MIB:
        return ""
    return (
        f"The disk of {directory} is full: {free} MiB are free, Esper needs {FULL_BELOW_MIB} MiB."
    )
