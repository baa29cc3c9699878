"""Snapshots on disk: their tensors become files that are mapped into memory.

    written → mapped → compared with the original, to the bit → the file's name is removed

The system reads a mapped file when it is needed, and may drop it from memory at any time. A file
without a name exists for as long as it is mapped: nothing is left of it when the snapshot is freed,
or when the process ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from esper.grafting.saved_values import bytes_in, same_bits
from esper.grafting.snapshot import Snapshot

RESERVE_BYTES = 64 << 20  # of the disk, that stays free
_PREFIX = "esper-snapshot-"


def spill(snapshot: Snapshot, folder: Path) -> int:
    """Moves a snapshot's tensors from memory into a file of ``folder``.

    Takes as long as writing and reading it.

    Returns:
        Bytes that are on disk now.

    Raises:
        OSError: it could not be written, or what was read is not the same; nothing was changed.
    """
    snapshot.arrival.wait()
    plain = [saved for saved in snapshot.saved() if bytes_in(saved)]
    mapped = _on_disk([saved.value.detach().cpu() for saved in plain], folder)
    for saved, value in zip(plain, mapped, strict=True):
        saved.value = value
    snapshot.bytes_on_disk = sum(value.nbytes for value in mapped)
    return snapshot.bytes_on_disk


def why_no_room(folder: Path, nbytes: int) -> str:
    """Why a snapshot of this size cannot be written there, a sentence; empty: it can."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"the folder for snapshots cannot be read: {error}"
    if free >= nbytes + RESERVE_BYTES:
        return ""
    return (
        f"its snapshot takes {nbytes >> 20} MiB, and the disk of {folder} has {free >> 20} MiB "
        "free: free some, or give esper.attach another snapshot_folder or more snapshot_memory"
    )


def _on_disk(values: list[Tensor], folder: Path) -> list[Tensor]:
    number, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    try:
        with os.fdopen(number, "wb") as file:
            torch.save(values, file)
        mapped: list[Tensor] = torch.load(name, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:  # torch's own, for a disk that is full
        raise OSError(str(error)) from error
    finally:
        with suppress(OSError):
            Path(name).unlink()
    for value, read in zip(values, mapped, strict=True):
        if not same_bits(read, value):
            raise OSError(f"{folder} gave back other bytes than were written")
    return mapped
