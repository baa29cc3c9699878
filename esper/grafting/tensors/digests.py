"""Digests of a model's tensors: SHA-256 over names, shapes, dtypes, bytes and ties."""

from __future__ import annotations

import atexit
import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper.grafting.tensors.forms import shape_of
from esper.grafting.tensors.saved_values import bytes_of
from esper.sharding import is_dtensor, local

logger = logging.getLogger("esper")

ENDING_SECONDS = 10.0  # how long the end of the program waits for a digest that has begun
NO_VALUES: Mapping[int, Tensor] = MappingProxyType({})


def digest(model: nn.Module) -> str:
    """Hex SHA-256 over the model's named tensors: names, shapes, dtypes, bytes and ties."""
    return _digest_of((name, id(tensor), tensor) for name, tensor in named_tensors(model))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers (also those outside the state dict); shared tensors once per name.

    One pass over the modules: torch's two passes would take a quarter of a graft's pause. A
    quantised tensor appears as the plain tensors inside it.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        lead = f"{prefix}." if prefix else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if hasattr(tensor, "__tensor_flatten__"):
                for i, part in enumerate(parts_of(tensor)):
                    yield f"{lead}{name}.{i}", part
            else:
                yield lead + name, tensor


def parts_of(tensor: Any) -> list[Tensor]:
    """The tensors that hold the numbers of this one: itself, or those inside a quantised one.

    Of a tensor that is spread over ranks, the part on this rank.

    None on the meta device, and for a lazy module that has not run: there are no numbers.
    """
    if is_dtensor(tensor):
        return [local(tensor)]
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in parts_of(getattr(tensor, name))]
    return [] if is_lazy(tensor) or tensor.is_meta else [tensor]


class Frozen:
    """A model's named tensors at one moment, for a digest that is computed on demand.

    Hashing a million parameters takes longer than grafting into them, so it happens after the
    pause, and may happen in another thread.
    """

    def __init__(
        self, entries: list[tuple[str, int, Tensor]], wait: Callable[[], object] | None = None
    ) -> None:
        self._entries = entries
        self._wait = wait
        self._form = [_form(*entry) for entry in entries]
        self._lock = threading.Lock()
        self._digest = ""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        values: Mapping[int, Tensor] = NO_VALUES,
        wait: Callable[[], object] | None = None,
    ) -> Frozen:
        """The present model.

        Args:
            values: id of a tensor -> a copy of it that is not written to; the others are copied.
            wait: returns when ``values`` can be read.
        """
        return cls([(name, id(t), _value(values, t)) for name, t in named_tensors(model)], wait)

    @classmethod
    def hashed(cls, model: nn.Module) -> Frozen:
        """The present model, hashed immediately, without copies."""
        frozen = cls([(name, id(tensor), tensor) for name, tensor in named_tensors(model)])
        _ = frozen.digest
        return frozen

    @property
    def digest(self) -> str:
        """The :func:`digest` of the model at that moment."""
        with self._lock:
            if not self._digest:
                if self._wait is not None:
                    self._wait()
                self._digest = _digest_of(self._entries)
                self._entries = []
            return self._digest

    def fits(self, model: nn.Module) -> bool:
        """The model has the same tensor objects under the same names, of the same form.

        Only valid while the tensors of that moment live.
        """
        return self._form == [_form(name, id(t), t) for name, t in named_tensors(model)]


def hash_in_background(frozen: Frozen) -> None:
    """Computes the digest in another thread, which then frees the copies of the tensors."""
    global _hashing
    with _starting:
        if _hashing is None or not _hashing.is_alive():
            _hashing = threading.Thread(target=_hash_all, name="esper-digests", daemon=True)
            _hashing.start()
    _waiting.put(frozen)


_waiting: queue.SimpleQueue[Frozen | None] = queue.SimpleQueue()  # None: the program ends
_starting = threading.Lock()
_hashing: threading.Thread | None = None  # a child process has none of its parent's threads


def _hash_all() -> None:
    while _hash_next():
        pass


def _hash_next() -> bool:
    """False when the program ends. No name keeps a digest's tensors alive while it waits."""
    frozen = _waiting.get()
    if frozen is None:
        return False
    try:
        _ = frozen.digest
    except Exception as error:  # out of memory, or a device that fails
        logger.debug("a digest could not be computed", exc_info=error)
    return True


def _end() -> None:
    """Python ends threads by force at its exit, and one that is inside torch then ends all."""
    with suppress(queue.Empty):
        while True:
            _waiting.get_nowait()  # nobody will read these digests
    _waiting.put(None)
    if _hashing is not None:
        _hashing.join(ENDING_SECONDS)


atexit.register(_end)


def _form(name: str, identity: int, tensor: Tensor) -> tuple[Any, ...]:
    shape = shape_of(tensor)
    return name, identity, tensor.dtype, shape


def _digest_of(entries: Iterable[tuple[str, int, Tensor]]) -> str:
    """Entries are (name, identity, value); equal identities are ties."""
    total = hashlib.sha256()
    first_names: dict[int, str] = {}
    for name, identity, tensor in entries:
        first = first_names.setdefault(identity, name)
        if is_lazy(tensor):  # it has no shape yet
            continue
        total.update(f"{name}\0{first}\0{tensor.dtype}\0{shape_of(tensor)}\0".encode())
        if first == name and not tensor.is_meta:
            total.update(bytes_of(tensor))
    return total.hexdigest()


def _value(values: Mapping[int, Tensor], tensor: Tensor) -> Tensor:
    if not parts_of(tensor):
        return tensor
    known = values.get(id(tensor))
    return tensor.detach().clone() if known is None else known
