"""Everything that a hard undo restores: weights, optimizer, schedulers, scaler, random streams.

Restoring copies into the present tensors: Parameter objects, ties and other references to them stay
the same objects. A snapshot that is kept for an undo also follows the script: it knows what the
script has set since (:mod:`esper.grafting.snapshots.host_settings`), and which weights it has
loaded.

    restore     everything as it was; for a change that failed, between two lines of the script
    roll back   what training has changed; what the script has set since stays
                (:mod:`esper.grafting.snapshots.rolling_back`)
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper.by_identity import ByIdentity, WeaklyByIdentity
from esper.fail_closed import contained
from esper.grafting.companions.companion import Companion, companions_of, put_back, with_companions
from esper.grafting.hooks import PassingHook
from esper.grafting.optimizers import unwrap_optimizer, unwrap_schedulers
from esper.grafting.slot import Slot, is_opaque, settle_spans
from esper.grafting.snapshots.host_settings import HostSettings, carry_over, form_of, is_own_key
from esper.grafting.surroundings import BARE, Surroundings
from esper.grafting.tensors.digests import Frozen, parts_of
from esper.grafting.tensors.forms import shape_of
from esper.grafting.tensors.random_streams import RandomStreams
from esper.grafting.tensors.saved_values import (
    Copy,
    SavedTensor,
    bytes_in,
    refill,
    restored,
    same_bits,
    same_tree,
    save_tree,
    tensors_in,
)
from esper.sharding import local

PAGE_BYTES = 4096


@dataclass(slots=True)
class SavedModule:
    """A module's tensors by name, and a slot's grafts."""

    name: str
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    grafts: dict[str, nn.Module | None] | None  # None: not a slot
    records: dict[str, Any] = field(default_factory=dict)
    carriers: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class SavedOptimizer:
    """An optimizer at one moment.

    Attributes:
        groups: (living dict, saved values).
        state: the same for the state of each tensor.
        reset: tensors whose state the script has removed or replaced since.
    """

    optimizer: torch.optim.Optimizer
    groups: list[tuple[dict[str, Any], dict[str, Any]]]
    state: dict[Any, tuple[Any, Any]]
    reset: set[Tensor] = field(default_factory=set)


class Arrival:
    """The moment when copies from a GPU have arrived in the host's memory."""

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._events = []
        for device in devices:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    def wait(self) -> None:
        """Returns when the copies can be read."""
        for event in self._events:
            event.synchronize()


class SnapshotMemory:
    """Memory for the next snapshot, allocated beside the training.

    Allocating memory takes longer than copying into it: the system provides it page by page, during
    a step. Tensors of a GPU are copied into pinned memory of the host, on the GPU's present stream,
    so before the next step writes to them; the loop does not wait for the copies.

    Args:
        on_device: leave the copies on the GPU while it has room, for a snapshot of one moment.
    """

    def __init__(self, *, on_device: bool = False) -> None:
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}
        self._on_device = on_device
        self._devices: set[torch.device] = set()

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
                fresh = _pinned_like(value) if value.is_cuda else torch.zeros_like(value)
                memory._free.setdefault(_form(value), []).append(fresh)
        return memory

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, in reserved memory of the same form if any is left."""
        free = self._free.get(_form(tensor)) if _is_large(tensor) else None
        if not tensor.is_cuda or tensor.layout is not torch.strided:
            return free.pop().copy_(tensor) if free else tensor.detach().clone()
        if self._on_device:
            try:
                return tensor.detach().clone()
            except torch.OutOfMemoryError:
                return tensor.detach().cpu()
        self._devices.add(tensor.device)
        host = free.pop() if free else _pinned_like(tensor)
        return host.copy_(tensor.detach(), non_blocking=True)

    def arrival(self) -> Arrival:
        """Of all copies so far."""
        return Arrival(self._devices)


def bytes_of_state(model: nn.Module, optimizers: Sequence[Any] = ()) -> int:
    """About what a snapshot takes: weights, buffers, gradients, and the state of the optimizers."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = [entry for o in with_companions(optimizers) for entry in o.state.values()]
    moments = [value for entry in states for value in entry.values() if isinstance(value, Tensor)]
    tensors = (*model.parameters(), *model.buffers(), *learning, *moments)
    parts = [local(t) for t in tensors if not is_lazy(t)]
    return sum(part.nbytes for part in parts if part.layout is torch.strided)


def _pinned_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory of the host that a GPU can write to by itself."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)


def _is_large(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or is_lazy(tensor):
        return False
    return tensor.device.type in ("cpu", "cuda") and tensor.nbytes >= PAGE_BYTES


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.device.type, tensor.dtype, tensor.shape, tensor.stride())


class _Later:
    """Tensors that a snapshot copies later: until then it has the tensors themselves.

    Args:
        roots: their buffers are copied at once.
        first: its weights too.
    """

    def __init__(
        self, memory: SnapshotMemory, roots: Iterable[nn.Module], first: nn.Module
    ) -> None:
        self.memory = memory
        buffers = [buffer for root in roots for buffer in root.buffers()]
        whole = (*buffers, *first.parameters())
        self._at_once = {id(part) for tensor in whole for part in parts_of(tensor)}
        self._themselves: dict[int, Tensor] = {}

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy, or the tensor itself under another name."""
        if id(tensor) in self._at_once:
            return self.memory.copy(tensor)
        itself = tensor.detach()
        self._themselves[id(itself)] = itself
        return itself

    def has(self, value: Tensor) -> bool:
        """It is no copy yet."""
        return id(value) in self._themselves


class Snapshot:
    """A run's state at one moment. :meth:`take` it, and :meth:`restore` it as often as needed.

    Attributes:
        roots: the model and its copies.
        tensors: theirs, in the order of the modules.
        gradients: (parameter, requires_grad, its gradient).
        optimizers: the user's; ``of_companions``: those of the grafts that were in the model.
        arrival: of the copies of a GPU's tensors.
        goal: the settings that an undo leaves behind; see
            :mod:`esper.grafting.snapshots.host_settings`.
        origin: the settings at the snapshot.
        bytes_on_disk: of its values, which :mod:`esper.grafting.snapshots.spilling` has moved
            there.
        loaded: tensors that the script has loaded since, with the values that it loaded.
        loaded_optimizers: those whose state the script has loaded since.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: ByIdentity[nn.Module, SavedModule] = ByIdentity()
        self.tensors: list[SavedTensor] = []
        self.gradients: list[tuple[nn.Parameter, bool, SavedTensor | None]] = []
        self.optimizers: list[SavedOptimizer] = []
        self.companions: list[tuple[torch.optim.Optimizer, tuple[Companion, ...]]] = []
        self.of_companions: list[SavedOptimizer] = []
        self.schedulers: list[tuple[Any, dict[str, Any]]] = []
        self.scaler: tuple[Any, dict[str, Any]] | None = None
        self.streams = RandomStreams.read()
        self.arrival = Arrival()
        self.bytes_on_disk = 0
        self.roots: list[nn.Module] = [model]
        self.loaded: dict[int, Tensor] = {}
        self.loaded_optimizers: set[torch.optim.Optimizer] = set()
        self._by_id: dict[int, SavedTensor] = {}
        self._later: _Later | None = None
        self._of_copies: set[int] = set()  # ids of modules
        self._seen: HostSettings | None = None  # None until :meth:`follow`

    @classmethod
    @torch.no_grad()
    def take(
        cls,
        model: nn.Module,
        surroundings: Surroundings = BARE,
        memory: SnapshotMemory | None = None,
        *,
        values: bool = True,
        first: nn.Module | None = None,
    ) -> Snapshot:
        """Copies everything; costs one copy of weights, gradients and optimizer state.

        Args:
            memory: reserved memory for the copies; the snapshot uses it up.
            values: False where no tensor will be written to before :meth:`restore`, which then
                restores the structure only. Nothing is copied.
            first: of the weights, gradients and moments, copy only the weights of this module;
                :meth:`complete` copies the others, to which nothing may be written before.
        """
        snapshot = cls(model)
        memory = memory or SnapshotMemory()
        at_once: Copy = memory.copy if values else Tensor.detach
        copied = at_once
        if first is not None:
            snapshot._later = _Later(memory, [model, *surroundings.copies], first)
            copied = snapshot._later.copy
        snapshot._save_model(model, copied)
        for average in surroundings.copies:
            snapshot.roots.append(average)
            snapshot._save_model(average, copied)
            snapshot._of_copies.update(map(id, average.modules()))
        users = [unwrap_optimizer(optimizer) for optimizer in surroundings.optimizers]
        snapshot.optimizers = [_save_optimizer(optimizer, at_once, copied) for optimizer in users]
        snapshot.companions = [(optimizer, companions_of(optimizer)) for optimizer in users]
        snapshot.of_companions = [
            _save_optimizer(companion.optimizer, at_once, copied)
            for _, companions in snapshot.companions
            for companion in companions
        ]
        snapshot.schedulers = [
            (scheduler, _save_attributes(scheduler, at_once))
            for scheduler in unwrap_schedulers(surroundings.schedulers)
        ]
        scaler = surroundings.scaler
        if scaler is not None:
            snapshot.scaler = (scaler, copy.deepcopy(scaler.state_dict()))
        snapshot.arrival = memory.arrival()
        return snapshot

    @torch.no_grad()
    def complete(self) -> None:
        """Copies what :meth:`take` has left for later, if anything."""
        later, self._later = self._later, None
        if later is None:
            return
        for saved in self.saved():
            if later.has(saved.value):
                saved.value = later.memory.copy(saved.tensor)
        self.arrival = later.memory.arrival()

    @torch.no_grad()
    def restore(self) -> None:
        """Restores everything to the bit: weights, optimizers, then the rest."""
        self.arrival.wait()
        self._restore_model()
        self.restore_companions()
        for optimizer in self.optimizers:
            _restore_optimizer(optimizer)
        for scheduler, attributes in self.schedulers:
            vars(scheduler).update(restored(attributes))
        if self.scaler is not None and self.scaler[1]:
            scaler, state = self.scaler
            scaler.load_state_dict(copy.deepcopy(state))
        self.streams.restore()

    def freeze(self, model: nn.Module) -> Frozen:
        """The present model, sharing the snapshot's copies of its tensors.

        Only valid while the tensors are unchanged: between taking the snapshot and the next step.
        Tensors that are not in the snapshot are copied.
        """
        values = {id(saved.tensor): saved.value for saved in self.tensors}
        return Frozen.of(model, values, self.arrival.wait)

    def saved(self) -> Iterator[SavedTensor]:
        """All saved tensors of the model and of the state of its optimizers."""
        yield from self.tensors
        yield from (saved for _, _, saved in self.gradients if saved is not None)
        for optimizer in (*self.optimizers, *self.of_companions):
            for _, tree in optimizer.state.values():
                yield from tensors_in(tree)

    @property
    def nbytes(self) -> int:
        """Memory of the copies, in bytes, without those on disk."""
        return max(0, sum(map(bytes_in, self.saved())) - self.bytes_on_disk)

    def differences(self) -> list[str]:
        """What differs from the snapshot, one entry per kind; empty right after a restore."""
        found = []
        if not all(same_bits(saved.tensor, saved.value) for saved in self.tensors):
            found.append("weights or buffers")
        companions = all(companions_of(o) == saved for o, saved in self.companions)
        optimizers = [*self.optimizers, *self.of_companions]
        if not companions or not all(_same_optimizer(saved) for saved in optimizers):
            found.append("optimizer state")
        if not all(_same_attributes(s, saved) for s, saved in self.schedulers):
            found.append("scheduler state")
        if not self.streams.equals(RandomStreams.read()):
            found.append("random streams")
        return found

    def grafts(self) -> set[nn.Module]:
        """The grafts that were in the model, except those of its copies."""
        own = [saved for module, saved in self.modules.items() if id(module) not in self._of_copies]
        kept = [saved.grafts or {} for saved in own]
        return {graft for grafts in kept for graft in grafts.values() if graft is not None}

    # -- what the script does since --------------------------------------------------------------

    def follow(self) -> None:
        """From now on, notices what the script sets and loads, for :func:`roll_back`."""
        self.origin = self._read()
        self.goal = self.origin.copy()
        self._seen = self.origin
        _followers(self.model).snapshots.add(self)
        _follow_loads(self)

    def absorb(self) -> None:
        """Puts what the script has set since the last look into the goal."""
        if self._seen is None:
            return
        now, goal = self._read(), self.goal.copy()
        carry_over(goal, self._seen, now)
        for module, members in now.members.items():
            before = self._seen.members[module]
            self._follow_conversions(before.parameters, members.parameters)
            self._follow_conversions(before.buffers, members.buffers)
        for saved in self.optimizers:
            saved.reset.update(_reset_keys(saved))
        self.goal, self._seen = goal, now  # last: an error must not leave half of it

    def rebase(self) -> None:
        """Esper has changed settings itself, which the script has not set."""
        if self._seen is None:
            return
        self._seen = self._read()
        for saved in self.optimizers:
            state = saved.optimizer.state
            saved.state = {key: (state.get(key), tree) for key, (_, tree) in saved.state.items()}

    def pairs_of(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of the tensor, its saved values), of those parts that the script has not loaded."""
        for part in parts_of(tensor):
            saved = self._by_id.get(id(part))
            if (
                saved is not None
                and shape_of(saved.value) == shape_of(part)
                and id(part) not in self.loaded
            ):
                yield part, saved.value

    def knows(self, tensor: Tensor) -> bool:
        """It has values for this tensor."""
        return id(tensor) in self._by_id

    def on_loaded(self, module: nn.Module) -> None:
        """The script has loaded a state dict: an undo keeps the values that it loaded."""
        if _followers(self.model).depth:
            return  # Esper loads something itself
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            for part in () if tensor is None else parts_of(tensor):
                saved = self._by_id.get(id(part))
                # A new copy: the snapshot's digest is computed from the old one.
                value = part.detach().clone()
                if saved is not None and shape_of(saved.value) == shape_of(value):
                    saved.value = value
                else:
                    self._add(SavedTensor(part, value, part.device))
                self.loaded[id(part)] = part

    def on_optimizer_loaded(self, optimizer: torch.optim.Optimizer) -> None:
        """The script has loaded an optimizer's state: an undo keeps what it loaded."""
        if _followers(self.model).depth:
            return
        self.absorb()
        self.loaded_optimizers.add(optimizer)
        for saved, records in zip(self.optimizers, self.goal.groups, strict=True):
            if saved.optimizer is not optimizer:
                continue
            for record in records:
                present = save_tree(_without_params(record.group), torch.clone)
                counters = present.keys() - record.settings.keys() - {"lr"}
                record.values.update({k: present[k] for k in counters if not is_own_key(k)})
            own = {parameter for record in records for parameter in record.params}
            for key, value in optimizer.state.items():
                if key in own:
                    saved.state[key] = (value, save_tree(value, torch.clone))
            saved.reset -= own

    def _read(self) -> HostSettings:
        return HostSettings.read(
            self.modules,
            # Also those that the script has added: a remedy of Esper may freeze them.
            [*self._parameters(), *(parameter for parameter, _, _ in self.gradients)],
            [saved.optimizer for saved in self.optimizers],
            [scheduler for scheduler, _ in self.schedulers],
        )

    def _parameters(self) -> Iterator[nn.Parameter]:
        for root in self.roots:
            yield from root.parameters()

    def _follow_conversions(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """``.to(…)`` may have made a new tensor of the old one: it gets the old one's values."""
        for name, tensor in now.items():
            old = before.get(name)
            if old is None or tensor is None or tensor is old or self.knows(tensor):
                continue
            saved = self._by_id.get(id(old))
            if (
                saved is not None
                and shape_of(old) == shape_of(tensor)
                and form_of(old) != form_of(tensor)
            ):
                self._add(SavedTensor(tensor, saved.value, saved.device))
                if isinstance(tensor, nn.Parameter):
                    self.gradients.append((tensor, tensor.requires_grad, None))

    def _add(self, saved: SavedTensor) -> None:
        self.tensors.append(saved)
        self._by_id[id(saved.tensor)] = saved

    # -- saving and restoring --------------------------------------------------------------------

    def _save_model(self, model: nn.Module, copied: Copy) -> None:
        seen: set[int] = set()
        for name, module in model.named_modules():
            is_slot = isinstance(module, Slot)
            if is_opaque(module):  # its dicts are copies, and its tensors are never replaced
                for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    self._save_once(own, seen, copied)
                continue
            self.modules[module] = SavedModule(
                name=name,
                parameters=dict(module._parameters),
                buffers=dict(module._buffers),
                grafts=dict(module._modules) if is_slot else None,
                records=dict(module.records) if isinstance(module, Slot) else {},
                carriers=dict(module.carriers) if isinstance(module, Slot) else {},
            )
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._save_once(tensor, seen, copied)

    def _save_once(self, tensor: Tensor, seen: set[int], copied: Copy) -> None:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            self._save_tensor(tensor, copied)

    def _save_tensor(self, tensor: Tensor, copied: Copy) -> None:
        for part in parts_of(tensor):
            self._add(SavedTensor.of(part, copied))
        if isinstance(tensor, nn.Parameter):
            grad = tensor.grad
            saved = None if grad is None else SavedTensor.of(grad, copied)
            self.gradients.append((tensor, tensor.requires_grad, saved))

    def _restore_model(self) -> None:
        for module, saved in self.modules.items():
            refill(module._parameters, saved.parameters)
            refill(module._buffers, saved.buffers)
        self.restore_grafts()
        for tensor in self.tensors:
            tensor.restore()
        for parameter, requires_grad, gradient in self.gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None if gradient is None else gradient.restore()

    def restore_companions(self) -> None:
        """The optimizers of the grafts that were in the model step again, with their state."""
        for optimizer, companions in self.companions:
            put_back(optimizer, companions)
        for saved in self.of_companions:
            _restore_optimizer(saved)

    def restore_grafts(self) -> None:
        """The slots that were in the model hold the grafts that they held."""
        slots = [(m, saved) for m, saved in self.modules.items() if isinstance(m, Slot)]
        for slot, saved in slots:
            refill(slot._modules, saved.grafts or {})
            refill(slot.records, saved.records)
            refill(slot.carriers, saved.carriers)
        for slot, _ in slots:
            slot.introduce()
        for module, saved in self.modules.items():
            if not saved.name:
                settle_spans(module)


# -- Esper's own changes, and what the script loads -----------------------------------------------


@dataclass(slots=True)
class _Followers:
    """The snapshots that follow one model, and how many own changes of Esper run at present."""

    snapshots: weakref.WeakSet[Snapshot] = field(default_factory=weakref.WeakSet)
    depth: int = 0


# By identity: a class of the script may compare as it likes.
_FOLLOWERS: MutableMapping[nn.Module, _Followers] = WeaklyByIdentity()


def _followers(model: nn.Module) -> _Followers:
    return _FOLLOWERS.setdefault(model, _Followers())


@contextmanager
def own_change(model: nn.Module) -> Iterator[None]:
    """What changes inside the block was changed by Esper, not by the script."""
    followers = _followers(model)
    if not followers.depth:
        for snapshot in tuple(followers.snapshots):
            snapshot.absorb()
    followers.depth += 1
    try:
        yield
    finally:
        followers.depth -= 1
        if not followers.depth:
            for snapshot in tuple(followers.snapshots):
                snapshot.rebase()


def _follow_loads(snapshot: Snapshot) -> None:
    """Hooks on each module that holds tensors: a script may load a part of the model."""
    handles = [
        module.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            PassingHook(partial(_on_loaded, weakref.ref(snapshot)))
        )
        for module, saved in snapshot.modules.items()
        if saved.parameters or saved.buffers
    ]
    handles += [
        saved.optimizer.register_load_state_dict_post_hook(
            partial(_on_optimizer_loaded, weakref.ref(snapshot))
        )
        for saved in snapshot.optimizers
    ]
    weakref.finalize(snapshot, _remove, handles)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


@contained(
    "snapshot", "An undo restores the weights from before the graft, not those loaded since."
)
def _on_loaded(reference: weakref.ref[Snapshot], module: nn.Module, _: object) -> None:
    snapshot = reference()
    if snapshot is not None:
        with torch.no_grad():
            snapshot.on_loaded(module)


@contained("snapshot", "An undo restores the optimizer from before the graft, not what was loaded.")
def _on_optimizer_loaded(
    reference: weakref.ref[Snapshot], optimizer: torch.optim.Optimizer
) -> None:
    snapshot = reference()
    if snapshot is not None:
        with torch.no_grad():
            snapshot.on_optimizer_loaded(optimizer)


# -- optimizers and schedulers --------------------------------------------------------------------


def _save_optimizer(
    optimizer: torch.optim.Optimizer, at_once: Copy, copied: Copy
) -> SavedOptimizer:
    """``at_once`` copies the settings, ``copied`` the state."""
    groups = [
        (group, {**save_tree(_without_params(group), at_once), "params": list(group["params"])})
        for group in optimizer.param_groups
    ]
    state = {key: (value, save_tree(value, copied)) for key, value in optimizer.state.items()}
    return SavedOptimizer(optimizer, groups, state)


def _restore_optimizer(saved: SavedOptimizer) -> None:
    optimizer = saved.optimizer
    optimizer.param_groups[:] = [group for group, _ in saved.groups]
    for group, held in saved.groups:
        params = list(held["params"])
        refill(group, {**restored(_without_params(held)), "params": params})
    state = {key: restored_state(*entry) for key, entry in saved.state.items()}
    optimizer.state.clear()
    optimizer.state.update(state)


def restored_state(live: Any, saved: Any) -> Any:
    """The state of one tensor, in the dict that held it; a reset makes another dict."""
    values = restored(saved)
    if not isinstance(live, dict) or not isinstance(values, dict):
        return values
    refill(live, values)
    return live


def _same_optimizer(saved: SavedOptimizer) -> bool:
    optimizer = saved.optimizer
    live = [group for group, _ in saved.groups]
    return (
        len(optimizer.param_groups) == len(live)
        and all(a is b for a, b in zip(optimizer.param_groups, live, strict=True))
        and all(_same_group(group, held) for group, held in saved.groups)
        and optimizer.state.keys() == saved.state.keys()
        and all(same_tree(optimizer.state[key], tree) for key, (_, tree) in saved.state.items())
    )


def _same_group(group: dict[str, Any], held: dict[str, Any]) -> bool:
    same_params = len(group["params"]) == len(held["params"]) and all(
        mine is theirs for mine, theirs in zip(group["params"], held["params"], strict=True)
    )
    return same_params and same_tree(_without_params(group), _without_params(held))


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _reset_keys(saved: SavedOptimizer) -> Iterator[Tensor]:
    for key, (live, tree) in saved.state.items():
        present = saved.optimizer.state.get(key)
        if isinstance(key, Tensor) and _was_reset(saved.optimizer, live, tree, present):
            yield key


def _was_reset(optimizer: torch.optim.Optimizer, live: Any, tree: Any, present: Any) -> bool:
    """The script has removed the state of a tensor, or its moments, since the snapshot.

    Training changes them in place. Only torch's own optimizers surely do so.
    """
    if live is None:
        return False  # Esper has removed it
    if present is not live:
        return True
    if not isinstance(tree, dict) or not type(optimizer).__module__.startswith("torch.optim"):
        return False
    if isinstance(optimizer, torch.optim.LBFGS):  # makes a new direction in each step
        return False
    return any(_is_new_moment(value, live.get(name)) for name, value in tree.items())


def _is_new_moment(saved: Any, present: Any) -> bool:
    if not isinstance(saved, SavedTensor) or not saved.value.dim():
        return False
    if not isinstance(present, Tensor):
        return True
    converted = (present.dtype, present.device) != (saved.value.dtype, saved.device)
    return present is not saved.tensor and not converted


def _save_attributes(scheduler: Any, copied: Copy) -> dict[str, Any]:
    # Not state_dict(): LambdaLR's omits its functions, and so the list's length.
    skipped = ("optimizer", "_schedulers")
    return {k: save_tree(v, copied) for k, v in vars(scheduler).items() if k not in skipped}


def _same_attributes(scheduler: Any, saved: dict[str, Any]) -> bool:
    return all(same_tree(getattr(scheduler, key), value) for key, value in saved.items())
