"""Saved tensors, and values that hold tensors: how they are kept, restored and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.sharding import local

Copy = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class SavedTensor:
    """A tensor object, its saved values, and the device that it was on."""

    tensor: Tensor
    value: Tensor
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor, copied: Copy) -> SavedTensor:
        return cls(tensor, copied(tensor), tensor.device)

    def restore(self) -> Tensor:
        """The same tensor object with the saved values; a new one if its form has changed."""
        if self.tensor.shape == self.value.shape and self.tensor.dtype == self.value.dtype:
            self.tensor.detach().copy_(self.value)
            return self.tensor
        return self.value.clone()

    def restore_into(self, present: Any) -> Tensor:
        """The saved values, in ``present`` if that is a tensor of this shape.

        The values are converted to the dtype and device of ``present``, which a script may have
        changed.
        """
        if isinstance(present, Tensor) and present.shape == self.value.shape:
            present.detach().copy_(self.value)
            return present
        return self.restore()


def save_tree(value: Any, copied: Copy) -> Any:
    """Copies dicts, lists, tuples and tensors; keeps other objects by reference."""
    if isinstance(value, Tensor):
        return SavedTensor.of(value, copied)
    if type(value) is dict:  # a Counter or the like is kept by reference
        return {key: save_tree(item, copied) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(save_tree(item, copied) for item in value)
    return value


def restored(value: Any) -> Any:
    """The saved tree as it was, in the same tensor objects."""
    if isinstance(value, SavedTensor):
        return value.restore()
    if type(value) is dict:
        return {key: restored(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(restored(item) for item in value)
    return value


def restored_into(value: Any, present: Any) -> Any:
    """As :func:`restored`; tensors of ``present`` keep the dtype and device that they have now."""
    if isinstance(value, SavedTensor):
        return value.restore_into(present)
    if type(value) is dict:
        own = present if isinstance(present, dict) else {}
        return {key: restored_into(item, own.get(key)) for key, item in value.items()}
    return restored(value)


def same_tree(live: Any, saved: Any) -> bool:
    """A living value equals what :func:`save_tree` saved, to the bit."""
    if isinstance(saved, SavedTensor):
        return isinstance(live, Tensor) and same_bits(live, saved.value)
    if type(saved) is dict:
        return (
            isinstance(live, dict)
            and live.keys() == saved.keys()
            and all(same_tree(live[key], item) for key, item in saved.items())
        )
    if type(saved) in (list, tuple):
        return (
            type(live) is type(saved)
            and len(live) == len(saved)
            and all(same_tree(a, b) for a, b in zip(live, saved, strict=True))
        )
    return same_value(live, saved)


def same_value(one: Any, other: Any) -> bool:
    """Equal, for values of any type; those that cannot be compared are equal if identical."""
    if one is other:
        return True
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return False


def same_bits(live: Tensor, value: Tensor) -> bool:
    """Same shape, dtype and bits; NaN equals itself."""
    live, value = local(live), local(value)  # comparing the whole would be a collective call
    if live.shape != value.shape or live.dtype != value.dtype:
        return False
    if torch.equal(live.detach(), value):
        return True
    return bytes(bytes_of(live)) == bytes(bytes_of(value))


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def refill(live: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """Gives a dict new contents; it stays the same object."""
    live.clear()
    live.update(saved)
