"""Saved tensors, and values that hold tensors: how they are kept, restored and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esper.grafting.tensors.forms import dense_parts, shape_of
from esper.sharding import local

Copy = Callable[[Tensor], Tensor]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


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
        same_form = shape_of(self.tensor) == shape_of(self.value)
        if same_form and self.tensor.dtype == self.value.dtype:
            write(self.tensor, self.value)
            return self.tensor
        return self.value.to(self.device, copy=True)

    def restore_into(self, present: Any) -> Tensor:
        """The saved values, in ``present`` if that is a tensor of this shape.

        The values are converted to the dtype and device of ``present``, which a script may have
        changed.
        """
        if isinstance(present, Tensor) and shape_of(present) == shape_of(self.value):
            write(present, self.value)
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


def write(live: Tensor, value: Tensor) -> None:
    """Copies ``value`` into a living tensor; a GPU copies on its stream, and nothing waits.

    Nothing is written to memory of the host that has these bits: it may be read-only, as that of a
    mapped file, where a write would end the process, or shared by several elements.
    """
    if not _has_bits(live.detach(), value):
        live.detach().copy_(value, non_blocking=live.is_cuda)


def _has_bits(live: Tensor, value: Tensor) -> bool:
    """Only asked of dense tensors in the host's memory; ends at the first difference."""
    pair = (live, value)
    if any(t.device.type != "cpu" or t.layout is not torch.strided for t in pair):
        return False
    if any(t.is_quantized or t.is_nested for t in pair):
        return False
    if live.dtype != value.dtype or any(type(t) not in (Tensor, nn.Parameter) for t in pair):
        return False
    if live.is_complex():
        pair = (torch.view_as_real(live.resolve_conj()), torch.view_as_real(value.resolve_conj()))
    integers = _INTEGERS[pair[0].element_size()]
    return torch.equal(pair[0].view(integers), pair[1].view(integers))


def same_bits(live: Tensor, value: Tensor) -> bool:
    """Same shape, dtype and bits; NaN equals itself."""
    live, value = local(live), local(value)  # comparing the whole would be a collective call
    if shape_of(live) != shape_of(value) or live.dtype != value.dtype:
        return False
    mine, theirs = dense_parts(live.detach()), dense_parts(value.to(live.device))
    return len(mine) == len(theirs) and all(map(_same_dense_bits, mine, theirs))


def _same_dense_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or bytes(bytes_of(one)) == bytes(bytes_of(other))


def all_same_bits(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Each living tensor has the bits of its value, converted to its dtype.

    Tensors on a device are compared there, and one flag for all of them is read.
    """
    flags = []
    for live, value in pairs:
        expected = value.to(live, non_blocking=live.is_cuda)
        if live.device.type == "cpu" or live.layout is not torch.strided:
            if not same_bits(live, expected):
                return False
        else:
            flags.append(differs(live, expected))
    return not any(bool(flag) for flag in _any_by_device(flags))


def differs(live: Tensor, expected: Tensor) -> Tensor:
    """Whether the bits of two tensors of one form differ, as a tensor on their device.

    Bits are compared as integers, because NaN is not equal to itself and 0 equals -0.
    """
    pair = [tensor.detach() for tensor in (live, expected)]
    if live.is_complex():
        pair = [torch.view_as_real(tensor) for tensor in pair]
    integers = _INTEGERS[pair[0].element_size()]
    mine, theirs = (tensor.view(integers) for tensor in pair)
    return torch.ne(mine, theirs).any()


def _any_by_device(flags: list[Tensor]) -> Iterator[Tensor]:
    for device in {flag.device for flag in flags}:
        yield torch.stack([flag for flag in flags if flag.device == device]).any()


def tensor_pairs(live: Any, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(living tensor, saved value) of each tensor in a saved tree that has its form still."""
    if isinstance(saved, SavedTensor):
        if isinstance(live, Tensor) and shape_of(live) == shape_of(saved.value):
            yield live, saved.value
    elif type(saved) is dict and isinstance(live, dict):
        for key, item in saved.items():
            yield from tensor_pairs(live.get(key), item)


def tensors_in(saved: Any) -> Iterator[SavedTensor]:
    """The tensors of a saved tree."""
    if isinstance(saved, SavedTensor):
        yield saved
        return
    items = saved.values() if type(saved) is dict else saved if type(saved) in (list, tuple) else ()
    for item in items:
        yield from tensors_in(item)


def bytes_in(saved: SavedTensor) -> int:
    """The size of the saved values."""
    return saved.value.nbytes if saved.value.layout is torch.strided else 0


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes on the CPU."""
    parts = dense_parts(tensor)
    if parts[0] is not tensor:
        return memoryview(b"".join(bytes(bytes_of(part)) for part in parts))
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return numbers_of(flat.view(torch.uint8)).data


def numbers_of(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor on the CPU, not copied.

    After ``tensor.numpy()`` torch would never again let the script resize this memory.
    """
    return np.from_dlpack(tensor)


def refill(live: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """Gives a dict new contents; it stays the same object."""
    live.clear()
    live.update(saved)
