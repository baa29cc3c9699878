"""Weak dictionaries that tell their keys apart by identity.

A class of the script may define ``==``, a hash, or an answer to every attribute, as it likes.
"""

from __future__ import annotations

import weakref

from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef


class _Reference(WeakIdRef):
    """torch's own asks its object for an attribute, for the sake of tensors."""

    __slots__ = ()
    __call__ = weakref.ref.__call__


class WeaklyByIdentity(WeakIdKeyDictionary):
    """For keys that are no tensors; those may come to life again."""

    def __init__(self) -> None:
        super().__init__(ref_type=_Reference)
