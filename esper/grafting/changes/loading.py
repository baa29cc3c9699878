"""``esper.load_state_dict``: a plain state with grafts, into a model without them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from esper.grafting.changes.structure import check_manifest, rebuild, take_back
from esper.grafting.receipts import Receipt
from esper.grafting.slot import SLOT_NAME, find_slot, slots
from esper.grafting.state_dicts import (
    Difference,
    LoadHooks,
    check_known,
    compare,
    follow_whole_states,
    named_tensors_of,
)
from esper.grafting.surroundings import Surroundings

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def load_state_dict(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    optimizer: Any = None,
    strict: bool = True,
    other_versions: bool = False,
) -> Any:
    """Loads a state that was saved with grafts into a model that lacks them, or has others.

    The grafts are built again first, from the state itself, so the model computes what the saved
    one computed, to the bit. A name that only a wrapper added (``module.``, ``_orig_mod.``) is
    taken off, and a tied weight that was saved under one of its names is loaded under all.

    Args:
        state: of ``model.state_dict()``, as it is or from a file.
        optimizer: one, or several in a list, that will train the grafts too.
        strict: as in torch.
        other_versions: accept a blueprint whose source has changed since.

    Returns:
        torch's missing and unexpected keys.

    Raises:
        ConfigurationError: the state's grafts cannot be built in this model, which is as before.
        RuntimeError: torch's own, for a state of another model.
    """
    several = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    surroundings = Surroundings(tuple(entry for entry in several if entry is not None))
    fitting = _with_ties(model, _without_wrappers(model, state))
    slotted = {layer for layer, _, _ in slots(model)}
    difference = compare(model, fitting)
    built = _adopt(model, difference, surroundings, other_versions=other_versions)
    try:
        result = model.load_state_dict(fitting, strict=strict)
    except BaseException:
        take_back(model, built, slotted)
        raise
    follow_whole_states(model)
    return result


def build_grafts_of_loaded_states(model: nn.Module) -> LoadHooks:
    """Until it is closed, ``model.load_state_dict`` builds the grafts of the state that it loads.

    Nothing trains these grafts; a session does this for the model that it watches. The hooks do not
    keep the model alive.
    """
    living = weakref.ref(model)

    def before(state: dict[str, Any], prefix: str) -> None:
        if (model := living()) is not None:
            _adopt(model, compare(model, state, prefix), Surroundings())

    def after() -> None:
        if (model := living()) is not None:
            follow_whole_states(model)

    return LoadHooks(model, before, after)


def _adopt(
    model: nn.Module,
    difference: Difference,
    surroundings: Surroundings,
    *,
    other_versions: bool = False,
) -> tuple[Receipt, ...]:
    """Gives the model the grafts of a state, without their weights; all of them or none."""
    check_known(difference)
    check_manifest(model, difference.coming, surroundings, other_versions=other_versions)
    for layer, slug in difference.leaving:
        slot = find_slot(model, layer)
        assert slot is not None
        slot.leave(slug)
    return rebuild(model, difference.coming, surroundings, other_versions=other_versions)


def _without_wrappers(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with the names that the model has."""
    fitting = dict(state)
    for wrapper in (*_WRAPPERS, *_WRAPPERS):  # one may be inside the other
        if wrapper.rstrip(".") in model._modules:
            continue
        if fitting and all(name.startswith(wrapper) for name in fitting):
            fitting = {name.removeprefix(wrapper): value for name, value in fitting.items()}
    return fitting


def _with_ties(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Also under those names of a shared tensor that were not saved, as safetensors leaves out."""
    named = [(n, t) for n, t in named_tensors_of(model) if SLOT_NAME not in n.split(".")]
    saved = {id(tensor): state[name] for name, tensor in named if name in state}
    missing = {n: saved[id(t)] for n, t in named if n not in state and id(t) in saved}
    return {**state, **missing}
