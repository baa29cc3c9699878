"""Everything that a hard undo restores: weights, optimizer, schedulers, scaler, random streams.

Restoring copies into the present tensors: Parameter objects, ties and other references to them stay
the same objects.
"""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper.grafting.companion import Companion, companions_of, put_back, with_companions
from esper.grafting.optimizers import unwrap_optimizer, unwrap_schedulers
from esper.grafting.slot import Slot, is_opaque
from esper.grafting.surroundings import BARE, Surroundings

PAGE_BYTES = 4096

Copy = Callable[[Tensor], Tensor]


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
                for i, part in enumerate(_parts_of(tensor)):
                    yield f"{lead}{name}.{i}", part
            else:
                yield lead + name, tensor


def _parts_of(tensor: Any) -> list[Tensor]:
    """The tensors that hold the numbers of this one: itself, or those inside a quantised one.

    None on the meta device, and for a lazy module that has not run: there are no numbers.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts_of(getattr(tensor, name))]
    return [] if is_lazy(tensor) or tensor.is_meta else [tensor]


class Frozen:
    """A model's named tensors at one moment, for a digest that is computed on demand.

    Hashing a million parameters takes longer than grafting into them, so it happens after the
    pause, and may happen in another thread.
    """

    def __init__(self, entries: list[tuple[str, int, Tensor]]) -> None:
        self._entries = entries
        self._digest = ""

    @classmethod
    def of(cls, model: nn.Module) -> Frozen:
        """The present model, hashed immediately, without copies."""
        frozen = cls([])
        frozen._digest = digest(model)
        return frozen

    @property
    def digest(self) -> str:
        """The :func:`digest` of the model at that moment."""
        entries = self._entries  # read first: another thread may finish and clear it
        if not self._digest:
            self._digest = _digest_of(entries)
            self._entries = []
        return self._digest


@dataclass(frozen=True, slots=True)
class RandomStreams:
    """States of Python's, numpy's, torch's and CUDA's global generators."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def read(cls) -> RandomStreams:
        numpy = sys.modules.get("numpy")  # not in use if it is not loaded
        initialized: Callable[[], bool] = torch.cuda.is_initialized
        cuda = torch.cuda.get_rng_state_all() if initialized() else ()
        return cls(
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(legacy=False),
            torch=torch.get_rng_state(),
            cuda=tuple(cuda),
        )

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))

    def equals(self, other: RandomStreams) -> bool:
        pairs = zip((self.torch, *self.cuda), (other.torch, *other.cuda), strict=False)
        return (
            self.python == other.python
            and _same_numpy(self.numpy, other.numpy)
            and len(self.cuda) == len(other.cuda)
            and all(torch.equal(mine, theirs) for mine, theirs in pairs)
        )


@contextmanager
def kept_streams() -> Iterator[None]:
    """Restores the global random streams after the block."""
    before = RandomStreams.read()
    try:
        yield
    finally:
        before.restore()


@dataclass(slots=True)
class _SavedTensor:
    """A tensor object and its saved values."""

    tensor: Tensor
    value: Tensor

    def restore(self) -> Tensor:
        if self.tensor.shape == self.value.shape and self.tensor.dtype == self.value.dtype:
            self.tensor.detach().copy_(self.value)
            return self.tensor
        return self.value.clone()


@dataclass(slots=True)
class _SavedModule:
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    grafts: dict[str, nn.Module | None] | None  # None: not a slot
    records: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _SavedOptimizer:
    optimizer: torch.optim.Optimizer
    groups: list[tuple[dict[str, Any], dict[str, Any]]]  # (live dict, saved values)
    state: dict[Any, Any]


class SnapshotMemory:
    """Memory for the next snapshot, allocated beside the training.

    Allocating memory takes longer than copying into it: the system provides it page by page, during
    a step. Only for tensors on the CPU; a GPU's allocator keeps a pool.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}

    @classmethod
    def reserve(cls, model: nn.Module, optimizers: Sequence[Any] = ()) -> SnapshotMemory:
        """Memory for the present tensors of a model and its optimizers.

        May run in another thread while the model trains: it only reads shapes, and no gradient.
        The backward pass replaces gradients without Python's lock, so reading ``grad`` beside it
        corrupts memory. A gradient has the form of its parameter.
        """
        memory = cls()
        parameters = list(model.parameters())
        gradients = [parameter for parameter in parameters if parameter.requires_grad]
        states = [list(o.state.values()) for o in with_companions(optimizers)]
        moments = [v for state in states for entry in state for v in list(entry.values())]
        for value in (*parameters, *list(model.buffers()), *gradients, *moments):
            if isinstance(value, Tensor) and _is_large(value):
                # Written to, so that the system allocates the pages.
                memory._free.setdefault(_form(value), []).append(torch.zeros_like(value))
        return memory

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, in reserved memory of the same form if any is left."""
        free = self._free.get(_form(tensor)) if _is_large(tensor) else None
        return free.pop().copy_(tensor) if free else tensor.detach().clone()


def _is_large(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or is_lazy(tensor):
        return False
    return tensor.device.type == "cpu" and tensor.nbytes >= PAGE_BYTES


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.dtype, tensor.shape, tensor.stride())


class Snapshot:
    """A run's state at one moment. :meth:`take` it, and :meth:`restore` it as often as needed."""

    def __init__(self) -> None:
        self._modules: dict[nn.Module, _SavedModule] = {}
        self._of_copies: set[nn.Module] = set()
        self._tensors: list[_SavedTensor] = []
        self._gradients: list[tuple[nn.Parameter, bool, _SavedTensor | None]] = []
        self._optimizers: list[_SavedOptimizer] = []
        self._companions: list[tuple[torch.optim.Optimizer, tuple[Companion, ...]]] = []
        self._schedulers: list[tuple[Any, dict[str, Any]]] = []
        self._scaler: tuple[Any, dict[str, Any]] | None = None
        self._streams = RandomStreams.read()

    @classmethod
    def take(
        cls,
        model: nn.Module,
        surroundings: Surroundings = BARE,
        memory: SnapshotMemory | None = None,
    ) -> Snapshot:
        """Copies everything; costs one copy of weights, gradients and optimizer state.

        Args:
            memory: reserved memory for the copies; the snapshot uses it up.
        """
        snapshot = cls()
        copied = (memory or SnapshotMemory()).copy
        with torch.no_grad():
            snapshot._save_model(model, copied)
            for average in surroundings.copies:
                snapshot._save_model(average, copied)
                snapshot._of_copies.update(average.modules())
            snapshot._optimizers = [
                _save_optimizer(o, copied) for o in with_companions(surroundings.optimizers)
            ]
            users = map(unwrap_optimizer, surroundings.optimizers)
            snapshot._companions = [(optimizer, companions_of(optimizer)) for optimizer in users]
            snapshot._schedulers = [
                (scheduler, _save_attributes(scheduler, copied))
                for scheduler in unwrap_schedulers(surroundings.schedulers)
            ]
            scaler = surroundings.scaler
            if scaler is not None:
                snapshot._scaler = (scaler, copy.deepcopy(scaler.state_dict()))
        return snapshot

    def restore(self) -> None:
        """Restores everything to the bit: weights, optimizers, then the rest."""
        with torch.no_grad():
            self._restore_model()
            for users, companions in self._companions:
                put_back(users, companions)
            for optimizer in self._optimizers:
                _restore_optimizer(optimizer)
            for scheduler, attributes in self._schedulers:
                vars(scheduler).update(_restored(attributes))
            if self._scaler is not None and self._scaler[1]:
                scaler, state = self._scaler
                scaler.load_state_dict(copy.deepcopy(state))
        self._streams.restore()

    def freeze(self, model: nn.Module) -> Frozen:
        """The present model, sharing the snapshot's copies of its tensors.

        Only valid while the tensors are unchanged: between taking the snapshot and the next step.
        Tensors that are not in the snapshot are copied.
        """
        values = {id(saved.tensor): saved.value for saved in self._tensors}
        return Frozen(
            [
                (name, id(tensor), _frozen_value(values, tensor))
                for name, tensor in named_tensors(model)
            ]
        )

    def differences(self) -> list[str]:
        """What differs from the snapshot, one entry per kind; empty right after a restore."""
        found = []
        if not all(_same_bits(saved.tensor, saved.value) for saved in self._tensors):
            found.append("weights or buffers")
        companions = all(companions_of(o) == saved for o, saved in self._companions)
        if not companions or not all(_same_optimizer(saved) for saved in self._optimizers):
            found.append("optimizer state")
        if not all(_same_attributes(s, saved) for s, saved in self._schedulers):
            found.append("scheduler state")
        if not self._streams.equals(RandomStreams.read()):
            found.append("random streams")
        return found

    @property
    def streams(self) -> RandomStreams:
        return self._streams

    def grafts(self) -> set[nn.Module]:
        """The grafts that were in the model, except those of its copies."""
        own = [saved for module, saved in self._modules.items() if module not in self._of_copies]
        kept = [saved.grafts or {} for saved in own]
        return {graft for grafts in kept for graft in grafts.values() if graft is not None}

    def _save_model(self, model: nn.Module, copied: Copy) -> None:
        seen: set[int] = set()
        for module in model.modules():
            is_slot = isinstance(module, Slot)
            if is_opaque(module):  # its dicts are copies, and its tensors are never replaced
                for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    self._save_once(own, seen, copied)
                continue
            self._modules[module] = _SavedModule(
                parameters=dict(module._parameters),
                buffers=dict(module._buffers),
                grafts=dict(module._modules) if is_slot else None,
                records=dict(module.records) if isinstance(module, Slot) else {},
            )
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._save_once(tensor, seen, copied)

    def _save_once(self, tensor: Tensor, seen: set[int], copied: Copy) -> None:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            self._save_tensor(tensor, copied)

    def _save_tensor(self, tensor: Tensor, copied: Copy) -> None:
        self._tensors += [_SavedTensor(part, copied(part)) for part in _parts_of(tensor)]
        if isinstance(tensor, nn.Parameter):
            grad = tensor.grad
            saved = None if grad is None else _SavedTensor(grad, copied(grad))
            self._gradients.append((tensor, tensor.requires_grad, saved))

    def _restore_model(self) -> None:
        for module, saved in self._modules.items():
            _refill(module._parameters, saved.parameters)
            _refill(module._buffers, saved.buffers)
            if isinstance(module, Slot):
                _refill(module._modules, saved.grafts or {})
                _refill(module.records, saved.records)
        for module in self._modules:
            if isinstance(module, Slot):
                module.introduce()
        for tensor in self._tensors:
            tensor.restore()
        for parameter, requires_grad, gradient in self._gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None if gradient is None else gradient.restore()


def _save_optimizer(optimizer: torch.optim.Optimizer, copied: Copy) -> _SavedOptimizer:
    groups = [
        (group, {**_save_tree(_without_params(group), copied), "params": list(group["params"])})
        for group in optimizer.param_groups
    ]
    state = {key: _save_tree(value, copied) for key, value in optimizer.state.items()}
    return _SavedOptimizer(optimizer, groups, state)


def _restore_optimizer(saved: _SavedOptimizer) -> None:
    optimizer = saved.optimizer
    optimizer.param_groups[:] = [group for group, _ in saved.groups]
    for group, held in saved.groups:
        params = list(held["params"])
        _refill(group, {**_restored(_without_params(held)), "params": params})
    optimizer.state.clear()
    for key, value in saved.state.items():
        optimizer.state[key] = _restored(value)


def _same_optimizer(saved: _SavedOptimizer) -> bool:
    optimizer = saved.optimizer
    live = [group for group, _ in saved.groups]
    return (
        len(optimizer.param_groups) == len(live)
        and all(a is b for a, b in zip(optimizer.param_groups, live, strict=True))
        and all(_same_group(group, held) for group, held in saved.groups)
        and optimizer.state.keys() == saved.state.keys()
        and all(_same_tree(optimizer.state[key], value) for key, value in saved.state.items())
    )


def _same_group(group: dict[str, Any], held: dict[str, Any]) -> bool:
    same_params = len(group["params"]) == len(held["params"]) and all(
        mine is theirs for mine, theirs in zip(group["params"], held["params"], strict=True)
    )
    return same_params and _same_tree(_without_params(group), _without_params(held))


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _save_attributes(scheduler: Any, copied: Copy) -> dict[str, Any]:
    # Not state_dict(): LambdaLR's omits its functions, and so the list's length.
    skipped = ("optimizer", "_schedulers")
    return {k: _save_tree(v, copied) for k, v in vars(scheduler).items() if k not in skipped}


def _same_attributes(scheduler: Any, saved: dict[str, Any]) -> bool:
    return all(_same_tree(getattr(scheduler, key), value) for key, value in saved.items())


def _save_tree(value: Any, copied: Copy) -> Any:
    """Copies dicts, lists, tuples and tensors; keeps other objects by reference."""
    if isinstance(value, Tensor):
        return _SavedTensor(value, copied(value))
    if type(value) is dict:  # a Counter or the like is kept by reference
        return {key: _save_tree(item, copied) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_save_tree(item, copied) for item in value)
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, _SavedTensor):
        return value.restore()
    if type(value) is dict:
        return {key: _restored(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_restored(item) for item in value)
    return value


def _same_tree(live: Any, saved: Any) -> bool:
    if isinstance(saved, _SavedTensor):
        return isinstance(live, Tensor) and _same_bits(live, saved.value)
    if type(saved) is dict:
        return (
            isinstance(live, dict)
            and live.keys() == saved.keys()
            and all(_same_tree(live[key], item) for key, item in saved.items())
        )
    if type(saved) in (list, tuple):
        return (
            type(live) is type(saved)
            and len(live) == len(saved)
            and all(_same_tree(a, b) for a, b in zip(live, saved, strict=True))
        )
    return live is saved or bool(live == saved)


def _same_bits(live: Tensor, value: Tensor) -> bool:
    if live.shape != value.shape or live.dtype != value.dtype:
        return False
    if torch.equal(live.detach(), value):
        return True
    return bytes(_bytes_of(live)) == bytes(_bytes_of(value))  # NaN is not equal to itself


def _same_numpy(mine: Any, theirs: Any) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return _numpy_key(mine) == _numpy_key(theirs)


def _numpy_key(state: dict[str, Any]) -> tuple[Any, ...]:
    """A numpy generator's state as a tuple that compares by value."""
    inner = state["state"]
    return (
        state["bit_generator"],
        *(value.tobytes() if hasattr(value, "tobytes") else value for value in inner.values()),
        state.get("has_gauss"),
        state.get("gauss"),
    )


def _digest_of(entries: Iterable[tuple[str, int, Tensor]]) -> str:
    """Entries are (name, identity, value); equal identities are ties."""
    total = hashlib.sha256()
    first_names: dict[int, str] = {}
    for name, identity, tensor in entries:
        first = first_names.setdefault(identity, name)
        if is_lazy(tensor):  # it has no shape yet
            continue
        total.update(f"{name}\0{first}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if first == name and not tensor.is_meta:
            total.update(_bytes_of(tensor))
    return total.hexdigest()


def _frozen_value(values: dict[int, Tensor], tensor: Tensor) -> Tensor:
    if not _parts_of(tensor):
        return tensor
    known = values.get(id(tensor))
    return tensor.detach().clone() if known is None else known


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _refill(live: dict[str, Any], saved: dict[str, Any]) -> None:
    live.clear()
    live.update(saved)
