"""What a hard undo does: it takes back what training has changed since a snapshot.

Tensor values, gradients, optimizer state, the schedulers' counters, the scaler's scale and the
random streams become those of the snapshot. What the script itself has set or loaded since stays:

    kept            what differs from the snapshot because the script has set it
    not restored    what the snapshot has no values for, such as a layer that was replaced
    rewound         weights that nothing trains, into which the script has written: torch tells
                    such a write from one of training no more than Esper can

A failure in the middle leaves the run half restored; the caller restores a second snapshot then.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper.grafting.slot import SLOT_NAME, is_opaque
from esper.grafting.snapshots.host_settings import (
    apply_groups,
    apply_lists,
    describe,
    keep_scaler_settings,
    listed,
)
from esper.grafting.snapshots.snapshot import SavedOptimizer, Snapshot
from esper.grafting.tensors.digests import named_tensors, parts_of
from esper.grafting.tensors.forms import shape_of
from esper.grafting.tensors.saved_values import (
    SavedTensor,
    all_same_bits,
    refill,
    restored,
    restored_into,
    tensor_pairs,
    write,
)


@dataclass(slots=True)
class RolledBack:
    """The result.

    Attributes:
        kept: what the script has set or loaded since the snapshot, and what stays so.
        not_restored: what is not as it was, because the snapshot has no values for it.
        rewound: weights that nothing trains and that the script has written to in place.
        differences: what differs from the snapshot though it was restored; an error of Esper.
    """

    kept: list[str] = field(default_factory=list)
    not_restored: list[str] = field(default_factory=list)
    rewound: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


@torch.no_grad()
def roll_back(snapshot: Snapshot) -> RolledBack:
    """Takes back what training has changed since ``snapshot``.

    Inside :func:`own_change`, which has told the snapshot what the script has set.
    """
    snapshot.arrival.wait()
    result = RolledBack()
    names = {id(tensor): name for name, tensor in named_tensors(snapshot.model)}

    def name_of(tensor: Tensor) -> str:
        return names.get(id(tensor), "a tensor that is not in the model")

    written = [name_of(parameter) for parameter in _written_by_script(snapshot)]
    if written:
        result.rewound.append(f"values of {listed(written)}")
    tensors = _restore_model(snapshot)
    snapshot.restore_companions()
    _note_tensors(snapshot, tensors, result)
    for saved, place in zip(snapshot.optimizers, range(len(snapshot.optimizers)), strict=True):
        held = {p for record in snapshot.goal.groups[place] for p in record.params}
        held_before = {p for record in snapshot.origin.groups[place] for p in record.params}
        apply_groups(saved.optimizer, snapshot.goal.groups[place])
        reset = _restore_state(saved, held, held_before)
        if reset:
            what = f"state of {listed([name_of(p) for p in reset])} in the optimizer: reset"
            result.kept.append(what)
    _restore_schedulers(snapshot)
    _restore_scaler(snapshot)
    snapshot.streams.restore()
    result.kept += describe(snapshot.origin, snapshot.goal, name_of)
    if snapshot.loaded_optimizers:
        result.kept.append("optimizer state: as the script has loaded it")
    result.differences += _differences(snapshot, tensors)
    return result


# -- the model ---------------------------------------------------------------------------------


def _restore_model(snapshot: Snapshot) -> list[SavedTensor]:
    """Returns the saved tensors whose values are in the model now."""
    present = {id(module) for root in snapshot.roots for module in root.modules()}
    for module, members in snapshot.goal.members.items():
        if id(module) in present:
            refill(module._parameters, members.parameters)
            refill(module._buffers, members.buffers)
    snapshot.restore_grafts()
    reachable = {id(part) for root in snapshot.roots for part in _parts_in(root)}
    done = []
    for saved in snapshot.tensors:
        if id(saved.tensor) in reachable and shape_of(saved.tensor) == shape_of(saved.value):
            write(saved.tensor, saved.value)
            done.append(saved)
    for parameter, requires_grad in snapshot.goal.flags.items():
        if parameter.requires_grad != requires_grad and _is_in(reachable, parameter):
            parameter.requires_grad_(requires_grad)
    for parameter, _, gradient in snapshot.gradients:
        if _is_in(reachable, parameter):
            _restore_gradient(parameter, gradient)
    return done


def _written_by_script(snapshot: Snapshot) -> list[Tensor]:
    """Frozen all the time, in no optimizer, and with other numbers than the snapshot's."""
    groups = [*snapshot.origin.groups, *snapshot.goal.groups]
    trained = {p for records in groups for record in records for p in record.params}
    flags, before = snapshot.goal.flags, snapshot.origin.flags
    still = [p for p in flags if not (flags[p] or before.get(p, True) or p in trained)]
    pairs = {p: list(snapshot.pairs_of(p)) for p in still}
    if all_same_bits(pair for own in pairs.values() for pair in own):  # one question to a device
        return []
    return [p for p, own in pairs.items() if not all_same_bits(own)]


def _is_in(reachable: set[int], tensor: Tensor) -> bool:
    return id(tensor) in reachable or any(id(part) in reachable for part in parts_of(tensor))


def _parts_in(root: nn.Module) -> Iterator[Tensor]:
    for module in root.modules():
        own: Iterable[Tensor | None]
        if is_opaque(module):
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        else:
            own = (*module._parameters.values(), *module._buffers.values())
        for tensor in own:
            if tensor is not None:
                yield from parts_of(tensor)


def _restore_gradient(parameter: nn.Parameter, gradient: SavedTensor | None) -> None:
    if gradient is None or gradient.value.shape != parameter.shape:
        parameter.grad = None
        return
    value = gradient.restore()
    if (value.dtype, value.device) != (parameter.dtype, parameter.device):
        value = value.to(parameter)  # the script has converted the parameter since
    parameter.grad = value


def _note_tensors(snapshot: Snapshot, done: list[SavedTensor], result: RolledBack) -> None:
    known = {id(saved.tensor) for saved in done}
    forms = Counter(
        what
        for saved in done
        for what in (
            f"dtype {saved.tensor.dtype}" * (saved.tensor.dtype != saved.value.dtype),
            f"device {saved.tensor.device}" * (saved.tensor.device != saved.device),
        )
        if what
    )
    result.kept += [f"{what} of {count} tensors" for what, count in forms.items()]
    loaded = [saved.tensor for saved in done if id(saved.tensor) in snapshot.loaded]
    if loaded:
        result.kept.append(f"weights that the script has loaded: {len(loaded)} tensors")
    unknown = [
        name
        for name, tensor in named_tensors(snapshot.model)
        if id(tensor) not in known and parts_of(tensor) and f".{SLOT_NAME}." not in f".{name}"
    ]
    if unknown:
        result.not_restored.append(f"values of {listed(unknown)}: they stay as they are now")


# -- what trains it ----------------------------------------------------------------------------


def _restore_state(
    saved: SavedOptimizer, held: set[Tensor], held_before: set[Tensor]
) -> list[Tensor]:
    """Restores the state of one optimizer; returns the tensors whose state the script has reset.

    Args:
        held: the tensors of its groups now.
        held_before: the tensors of its groups at the snapshot.
    """
    optimizer = saved.optimizer
    state = optimizer.state
    reset: list[Tensor] = []
    for key in list(state):
        added = key in held and key not in held_before
        if key not in saved.state and not (added and _is_finite(state[key])):
            del state[key]
    for key, (live, tree) in saved.state.items():
        if key in held_before and key not in held:
            continue  # the script has taken it out of the optimizer
        if key in saved.reset:
            state.pop(key, None)
            _start_state(optimizer, key)
            reset.append(key)
        elif isinstance(live, dict) and isinstance(tree, dict):
            refill(live, restored_into(tree, dict(live)))
            state[key] = live
        else:
            state[key] = restored(tree)
    return reset


def _start_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    # Adagrad alone creates its state when it is built, and expects it later (pytorch#53712).
    if isinstance(optimizer, torch.optim.Adagrad):
        start = optimizer.defaults["initial_accumulator_value"]
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, dtype=torch.float32, device="cpu"),
            "sum": torch.full_like(parameter, start, memory_format=torch.preserve_format),
        }


def _is_finite(state: Any) -> bool:
    values = state.values() if isinstance(state, dict) else ()
    numbers = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return all(bool(value.isfinite().all()) for value in numbers)


def _restore_schedulers(snapshot: Snapshot) -> None:
    for place, (scheduler, attributes) in enumerate(snapshot.schedulers):
        vars(scheduler).update(restored(attributes))
        vars(scheduler).update(snapshot.goal.schedulers[place])
        apply_lists(scheduler, place, snapshot.goal.groups)


def _restore_scaler(snapshot: Snapshot) -> None:
    if snapshot.scaler is not None and snapshot.scaler[1]:
        scaler, state = snapshot.scaler
        scaler.load_state_dict(keep_scaler_settings(copy.deepcopy(state), scaler))


def _state_pairs(saved: SavedOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    held = {p for group in saved.optimizer.param_groups for p in group["params"]}
    for key, (_, tree) in saved.state.items():
        if key in held and key not in saved.reset:
            yield from tensor_pairs(saved.optimizer.state.get(key), tree)


def _differences(snapshot: Snapshot, done: list[SavedTensor]) -> list[str]:
    found = []
    if not all_same_bits((saved.tensor, saved.value) for saved in done):
        found.append("weights or buffers")
    if not all_same_bits(pair for saved in snapshot.optimizers for pair in _state_pairs(saved)):
        found.append("optimizer state")
    if not snapshot.streams.stay_restored():
        found.append("random streams")
    return found
