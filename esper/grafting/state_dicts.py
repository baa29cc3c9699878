"""A model's plain state dict, loaded across a graft.

A state was saved with certain grafts, and the model that loads it holds others. Afterwards the
model computes exactly what the state's model computed, or the load raises and says what to do:

the state lacks a graft   the graft is taken out: it was trained with other weights of its layer
the state has one more    it is built again from the state's manifest by an attached session or by
                          :func:`esper.load_state_dict`; without them torch names the keys
the grafts are equal      their weights are loaded like any others

torch calls :func:`follow_state` before it loads: at each layer with grafts, for states of a part of
the model, and at the model, which alone shows that a tied weight is loaded under another name.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.blueprints import list_blueprints
from esper.exceptions import ConfigurationError, EsperError
from esper.fail_closed import errors_ignored, is_the_scripts, short
from esper.grafting.hooks import PassingHook, register_alike
from esper.grafting.manifest import MANIFEST_KEY, unpack
from esper.grafting.slot import (
    LOAD_HOOK_MARK,
    SLOT_NAME,
    Slot,
    find_host,
    find_slot,
    follows_loads,
    is_opaque,
    keep_code_apart,
    run_slot,
    slot_of,
    slots,
)

logger = logging.getLogger("esper")


@dataclass(frozen=True, slots=True)
class Difference:
    """What must change in a model before a state is loaded.

    Attributes:
        leaving: (layer, slug) of grafts that the state lacks.
        coming: manifest entries of grafts that the model lacks, with the layer's name in the model.
        unknown: layers whose grafts the state holds without saying how they were built.
    """

    leaving: tuple[tuple[str, str], ...] = ()
    coming: tuple[dict[str, Any], ...] = ()
    unknown: tuple[str, ...] = ()


def compare(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> Difference:
    """The model's grafts beside those of a state.

    Args:
        prefix: of the model's names in the state.

    Raises:
        ConfigurationError: a manifest in the state cannot be read.
    """
    here = {layer: slot for layer, _, slot in slots(model) if slot.grafts()}
    there = _grafts_in(state, prefix)
    loaded = _loaded_tensors(model, state, prefix) if here else set()
    leaving, coming, unknown = [], [], []
    for layer in dict.fromkeys([*here, *there]):
        slot, saved = here.get(layer), there.get(layer, _Saved())
        mine = {} if slot is None else {slug: slot.records[slug].config for slug in slot.grafts()}
        # A state of other layers says nothing about this one.
        affected = layer in there or bool(loaded & _own_tensors(model, layer))
        gone = [slug for slug in mine if affected and not saved.holds(slug, mine[slug])]
        leaving += [(layer, slug) for slug in gone]
        fresh = saved.slugs - (mine.keys() - gone)
        coming += [
            _at(entry, model, layer) for entry in saved.entries if entry["blueprint"] in fresh
        ]
        if fresh - {entry["blueprint"] for entry in saved.entries}:
            unknown.append(layer)
    return Difference(tuple(leaving), tuple(coming), tuple(unknown))


def follow_state(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """torch's hook before ``module`` loads a state; takes out the grafts that the state lacks."""
    try:
        for layer, slug in compare(module, state_dict, prefix).leaving:
            slot = find_slot(module, layer)
            if slot is not None and slug in slot.grafts() and not slot.leave(slug):
                logger.warning(taken_out_text(prefix + layer, slug))
    except Exception as error:
        if is_the_scripts(error):
            raise
        error_msgs.append(problem(error))


setattr(follow_state, LOAD_HOOK_MARK, True)


def follow_loads(
    model: nn.Module, host: nn.Module, slug: str, leave: Callable[[], object] | None = None
) -> None:
    """From now on, loading a state that lacks the host's graft takes the graft out.

    Args:
        leave: takes the graft out of what trains it.
    """
    slot = slot_of(host)
    assert slot is not None
    if leave is not None:
        slot.on_leave(slug, leave)
    if not slot.load_handles and host is not model:
        slot.load_handles = [_before_loads(host)]


def put_back_slots(model: nn.Module, kept: Mapping[str, Slot]) -> None:
    """Gives the layers the slots again that they had, with their hooks; a removal has failed."""
    for layer, slot in kept.items():
        host = find_host(model, layer)
        for handle in (slot.handle, *slot.load_handles):
            if handle is not None:
                handle.remove()
        slot.handle = register_alike("slot", host, run_slot)
        slot.load_handles = [_before_loads(host)] if slot.load_handles else []
        host._modules[SLOT_NAME] = slot
        keep_code_apart(host)
    follow_whole_states(model)


def follow_whole_states(model: nn.Module) -> None:
    """Calls :func:`follow_state` for the model too, while it has grafts. Not during a load."""
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(map(follows_loads, hooks)) and any(True for _ in slots(model)):
        _before_loads(model)


class _Following(PassingHook):
    """A hook of :class:`LoadHooks`; ``copied`` is told of copies of the model."""

    def __init__(self, hook: Callable[..., Any], copied: Callable[[dict[int, Any]], object]):
        super().__init__(hook)
        self._copied = copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with errors_ignored():
            self._copied(memo)
        make, arguments = self.__reduce__()
        return make(*arguments)


def is_followed(model: nn.Module) -> bool:
    """A session, or a callback of a framework, brings the model's grafts in line with its loads."""
    return any(
        isinstance(getattr(hook, "hook", None), _Following)
        for module in model.modules()
        for hook in module._load_state_dict_pre_hooks.values()
    )


class LoadHooks:
    """torch's hooks around a model's loads, which copies and pickle leave behind.

    Args:
        before: called with the state, which it may change, and the prefix of the model's names in
            it. What it raises ends the load before anything is loaded.
        after: called when the load is over.
        copied: called with the memo of a ``copy.deepcopy`` that copies the model.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[dict[str, Any], str], object],
        after: Callable[[], object],
        copied: Callable[[dict[int, Any]], object] = lambda memo: None,
    ) -> None:
        self._before, self._after = before, after
        self._handles: list[RemovableHandle] = []
        if is_opaque(model):  # a model that is scripted as a whole takes no such hook, nor a graft
            return
        register: Callable[..., RemovableHandle] = model.register_load_state_dict_pre_hook
        finish: Callable[..., RemovableHandle] = model.register_load_state_dict_post_hook
        self._handles = [
            register(_Following(self._enter, copied)),
            finish(_Following(self._leave, lambda memo: None)),
        ]

    def close(self) -> None:
        """Not during a load."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        try:
            self._before(state, prefix)
        except EsperError:
            raise
        except Exception as error:
            if is_the_scripts(error):
                raise
            raise ConfigurationError(problem(error)) from error

    def _leave(self, module: nn.Module, keys: Any) -> None:
        self._after()


def _before_loads(module: nn.Module) -> RemovableHandle:
    register: Callable[..., RemovableHandle] = module.register_load_state_dict_pre_hook
    return register(follow_state)


def check_known(difference: Difference) -> None:
    """Raises ``ConfigurationError`` where the state does not say how its grafts were built."""
    if difference.unknown:
        layers = ", ".join(difference.unknown)
        raise ConfigurationError(
            f"the state holds grafts at {layers} that this model lacks, without the entry "
            f"{MANIFEST_KEY} that describes them: save model.state_dict() with all its entries, or "
            "load the session's state first"
        )


def problem(error: Exception) -> str:
    """For torch's list of errors of a load."""
    reason = str(error) if isinstance(error, EsperError) else short(error)
    return f"Esper cannot bring the model's grafts in line with this state: {reason}."


def taken_out_text(layer: str, slug: str) -> str:
    """One line about a graft that a load took out."""
    return (
        f"the loaded state was saved without {slug} at {layer}, so this graft was taken out: the "
        "model computes what the state's model computed"
    )


@dataclass(slots=True)
class _Saved:
    """The grafts of one layer in a state."""

    slugs: set[str] = field(default_factory=set)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def holds(self, slug: str, config: dict[str, Any]) -> bool:
        """The state has this graft, with these settings as far as it says."""
        described = [entry for entry in self.entries if entry["blueprint"] == slug]
        return slug in self.slugs and all(entry["config"] == config for entry in described)


def _grafts_in(state: Mapping[str, Any], prefix: str) -> dict[str, _Saved]:
    found: dict[str, _Saved] = defaultdict(_Saved)
    for key, (layer, rest) in _keys_of_grafts(state, prefix).items():
        saved = found[layer]
        if rest == MANIFEST_KEY:
            saved.entries = unpack(state[key])
            saved.slugs |= {entry["blueprint"] for entry in saved.entries}
        else:
            saved.slugs.add(rest.partition(".")[0])
    return found


def keys_of_grafts(state: Iterable[str], prefix: str = "") -> list[str]:
    """The names in a state that belong to grafts, and not to a module of the user of that name."""
    return list(_keys_of_grafts(state, prefix))


def _keys_of_grafts(state: Iterable[str], prefix: str) -> dict[str, tuple[str, str]]:
    """Name of a graft's entry -> (layer, name in its slot).

    The user's model may have a module that is called as a slot is. A slot has a manifest; where an
    older state or a filter has left that out, the names of the blueprints tell.
    """
    split = {key: found for key in state if (found := _split(key, prefix))[1]}
    if not split:
        return {}
    described = {layer for layer, rest in split.values() if rest == MANIFEST_KEY}
    slugs = {blueprint.slug for blueprint in list_blueprints()}
    return {
        key: (layer, rest)
        for key, (layer, rest) in split.items()
        if layer in described or rest.partition(".")[0] in slugs
    }


def _split(key: str, prefix: str) -> tuple[str, str]:
    """(layer, name in it) where a slot is named; two empty texts for any other key."""
    if not key.startswith(prefix):
        return "", ""
    layer, mark, rest = f".{key[len(prefix) :]}".partition(f".{SLOT_NAME}.")
    return (layer[1:], rest) if mark else ("", "")


def _loaded_tensors(model: nn.Module, state: Mapping[str, Any], prefix: str) -> set[int]:
    """The ids of the model's tensors that the state fills, under any of their names."""
    return {
        id(tensor)
        for name, tensor in named_tensors_of(model)
        if getattr(state.get(f"{prefix}{name}"), "shape", None) == tensor.shape
    }


def pop_grafts(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Takes the entries of grafts out of a state, and returns them with the model's own names."""
    keys = keys_of_grafts(state, prefix)
    return {key.removeprefix(prefix): state.pop(key) for key in keys}


def named_tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, shared ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _own_tensors(model: nn.Module, layer: str) -> set[int]:
    """The ids of the layer's tensors, without those of grafts."""
    host = find_host(model, layer)
    return {id(t) for name, t in named_tensors_of(host) if SLOT_NAME not in name.split(".")}


def _beside(saved: str, here: str, other: str) -> str:
    """The name here of a layer ``other`` of the state, where ``saved`` is now called ``here``."""
    if saved.endswith(here):
        return other.removeprefix(saved[: len(saved) - len(here)])
    return here.removesuffix(saved) + other if here.endswith(saved) else other


def _at(entry: dict[str, Any], model: nn.Module, layer: str) -> dict[str, Any]:
    """For the layer as it is in this model, which may be of another precision or wrapped."""
    described = {**entry["layer"], "name": layer}
    if described.get("since"):
        described["since"] = _beside(str(entry["layer"]["name"]), layer, str(described["since"]))
    host = dict(model.named_modules()).get(layer)
    own = next((p for p in host.parameters() if p.is_floating_point()), None) if host else None
    if own is not None:
        described["dtype"] = str(own.dtype).removeprefix("torch.")
    return {**entry, "layer": described}
