"""Dictionaries that tell their keys apart by identity.

A class of the script may define ``==``, a hash, or an answer to every attribute, as it likes. The
hash of a metric of torchmetrics changes with each of its values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from typing import TypeVar

from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef


class _Reference(WeakIdRef):
    """torch's own asks its object for an attribute, for the sake of tensors."""

    __slots__ = ()
    __call__ = weakref.ref.__call__


class WeaklyByIdentity(WeakIdKeyDictionary):
    """For keys that are no tensors; those may come to life again."""

    def __init__(self) -> None:
        super().__init__(ref_type=_Reference)


K = TypeVar("K")
V = TypeVar("V")


class ByIdentity(MutableMapping[K, V]):
    """Keeps its keys alive."""

    def __init__(self, entries: Iterable[tuple[K, V]] = ()) -> None:
        self._entries = {id(key): (key, value) for key, value in entries}

    def __getitem__(self, key: K) -> V:
        return self._entries[id(key)][1]

    def __setitem__(self, key: K, value: V) -> None:
        self._entries[id(key)] = key, value

    def __delitem__(self, key: K) -> None:
        del self._entries[id(key)]

    def __iter__(self) -> Iterator[K]:
        return (key for key, _ in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)
