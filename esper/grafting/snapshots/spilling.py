"""Snapshots on disk: their tensors become a file that is mapped into memory.

    another thread    writes → maps → compares with the original, to the bit
    training thread   between two steps: the snapshot takes the mapped tensors for its copies

Until then the copies are in memory, and an undo needs no file. The system reads a mapped file when
it is needed, and may drop it from memory at any time. The file has no name from the beginning:
nothing is left of it when the snapshot is freed, or when the process ends, however it ends.
"""

from __future__ import annotations

import atexit
import mmap
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.grafting.snapshots.snapshot import Snapshot
from esper.grafting.tensors.saved_values import bytes_in, bytes_of, same_bits

RESERVE_BYTES = 64 << 20  # of the disk, that stays free
CHUNK_BYTES = 16 << 20  # written at once; the end of the program waits for no more
ENDING_SECONDS = 10.0
_ALIGNMENT = 64  # of each tensor in the file


class Writing:
    """A snapshot on its way into a file of ``folder``, in another thread.

    Args:
        snapshot: as it was taken; it may be restored meanwhile.
    """

    def __init__(self, snapshot: Snapshot, folder: Path) -> None:
        self._folder = folder
        self._arrival = snapshot.arrival
        self._copies = [(saved, saved.value) for saved in snapshot.saved() if bytes_in(saved)]
        self._mapped: list[Tensor] | None = None
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._write, name="esper-snapshot", daemon=True)
        try:
            self._thread.start()
            _UNFINISHED.add(self)
        except RuntimeError as error:  # the system gives no more threads
            self._error = error

    @property
    def is_done(self) -> bool:
        """It has written all, or has failed."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Nobody needs the snapshot any more; returns at once."""
        self._stopped.set()

    def end(self) -> None:
        """As :meth:`stop`, and waits for the thread, but not for long."""
        self._stopped.set()
        self._thread.join(ENDING_SECONDS)

    def take_over(self) -> int:
        """Puts the tensors on disk into the snapshot; waits until they are written.

        What the snapshot has got another copy of meanwhile, because the script loaded a state,
        stays in memory.

        Returns:
            Bytes that are on disk now.

        Raises:
            OSError: it could not be written, or what was read is not the same; nothing was changed.
        """
        if self._thread.ident is not None:
            self._thread.join()
        if self._mapped is None:
            reason = self._error or "its thread has ended"  # in a child process
            raise OSError(str(reason)) from self._error
        written = 0
        for (saved, value), mapped in zip(self._copies, self._mapped, strict=True):
            if saved.value is value:
                saved.value = mapped
                written += mapped.nbytes
        return written

    def _write(self) -> None:
        try:
            self._arrival.wait()
            values = [value for _, value in self._copies]
            self._mapped = _on_disk(values, self._folder, self._stopped.is_set)
        except Exception as error:
            self._error = error


_UNFINISHED: weakref.WeakSet[Writing] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """Python ends threads by force at its exit, and one that is inside torch then ends all."""
    for writing in tuple(_UNFINISHED):
        writing.end()


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


def _on_disk(values: list[Tensor], folder: Path, stopped: Callable[[], bool]) -> list[Tensor]:
    """The same tensors, mapped from a file. Raises ``OSError``."""
    if not values:
        return []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        places = [_append(file, value, stopped) for value in values]
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped = []
    for value, place in zip(values, places, strict=True):
        read = _read(memory, place, value)
        if stopped():
            raise InterruptedError("the snapshot was not needed any more")
        if not same_bits(read, value):
            raise OSError(f"{folder} gave back other bytes than were written")
        mapped.append(read)
    return mapped


def _append(file: Any, value: Tensor, stopped: Callable[[], bool]) -> int:
    """Writes a tensor's bytes at the end; returns where they begin."""
    place: int = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
    file.seek(place)
    left = bytes_of(value.permute(_by_stride(value)))
    while left:
        if stopped():
            raise InterruptedError("the snapshot was not needed any more")
        left = left[file.write(left[:CHUNK_BYTES]) :]
    return place


def _read(memory: mmap.mmap, place: int, like: Tensor) -> Tensor:
    """A tensor of the form of ``like``, whose bytes are at this place."""
    order = _by_stride(like)
    flat = torch.frombuffer(memory, dtype=like.dtype, offset=place, count=like.numel())
    inverse = sorted(range(like.dim()), key=order.__getitem__)
    return flat.reshape([like.shape[axis] for axis in order]).permute(inverse)


def _by_stride(tensor: Tensor) -> list[int]:
    """Axes in the order in which they lie in memory: a copy keeps a channels-last form."""
    return sorted(range(tensor.dim()), key=lambda axis: -tensor.stride()[axis])
