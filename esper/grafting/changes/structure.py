"""The structure manifest: what was grafted where, so that a checkpoint can be loaded again.

Order of a restore: :func:`rebuild` the grafts, ``model.load_state_dict``, then
:func:`load_optimizer_state_by_name` and
:func:`load_companion_states_by_name`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from esper.blueprints import Blueprint, get_blueprint
from esper.contracts import LayerInfo
from esper.exceptions import ConfigurationError, GraftError
from esper.grafting.changes.apply import insert_graft
from esper.grafting.companions.companion import companions_of
from esper.grafting.layers.graph import trace_layers
from esper.grafting.manifest import GraftRecord
from esper.grafting.optimizers import unwrap_optimizer
from esper.grafting.ranks.replicas import WHOLE_MODEL
from esper.grafting.receipts import Receipt
from esper.grafting.slot import find_host, graft_at, remove_slots, slots
from esper.grafting.surroundings import BARE, Surroundings
from esper.grafting.tensors.digests import Frozen
from esper.sharding import spread_like

# Optimizer state whose shape torch does not check; Adafactor's rows and columns, and counters, have
# other shapes than the parameter.
_SHAPED_LIKE_THE_PARAMETER = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum", "exp_inf"}
)


def structure(model: nn.Module) -> list[dict[str, Any]]:
    """The grafts of the model as JSON values, in the order in which a layer runs them."""
    return [entry for _, _, slot in slots(model) for entry in slot.manifest()]


def rebuild(
    model: nn.Module,
    manifest: Sequence[dict[str, Any]],
    surroundings: Surroundings = BARE,
    *,
    other_versions: bool = False,
) -> tuple[Receipt, ...]:
    """Builds the grafts of a manifest again, each from its seed, before a state dict is loaded.

    All of them or none: if one cannot be built, the model is as before.

    Args:
        surroundings: what trains the model. Its copies and replicas are for the receipts: the
            caller lets them follow once the weights are loaded.
        other_versions: accept a blueprint whose source has changed since.

    Returns:
        Receipts for a soft undo; there is no snapshot of the model without them.

    Raises:
        ConfigurationError: not a manifest, the manifest of another model, or a blueprint's source
            has changed.
        UnknownBlueprintError, UnknownLayerError: they do not exist here.
    """
    records = check_manifest(model, manifest, surroundings, other_versions=other_versions)
    slotted = {name for name, _, _ in slots(model)}
    receipts: list[Receipt] = []
    try:
        for record in records:
            receipts.append(_rebuild_one(model, record, surroundings))
    except BaseException:
        take_back(model, receipts, slotted)
        raise
    return tuple(receipts)


def check_manifest(
    model: nn.Module,
    manifest: Sequence[dict[str, Any]],
    surroundings: Surroundings = BARE,
    *,
    other_versions: bool = False,
) -> list[GraftRecord]:
    """The manifest's grafts, if they can be built in this model. Raises as :func:`rebuild`."""
    records = [GraftRecord.of_entry(entry) for entry in manifest]
    layers = {layer.name: layer for layer in trace_layers(model)} if records else {}
    for record in records:
        _check_version(record, get_blueprint(record.blueprint), other_versions)
        find_host(model, record.layer.name)
        shared = None if surroundings.replicas is None else surroundings.replicas.whole_model
        if shared is not None and record.layer.name == WHOLE_MODEL:
            _check_whole_model(record.layer, shared)
        else:
            _check_layer(record.layer, _in_this_model(record.layer, layers))
    return records


def _in_this_model(saved: LayerInfo, layers: dict[str, LayerInfo]) -> LayerInfo | None:
    """The same layer here; for a span, with the input of the earlier layer."""
    found = layers.get(saved.name)
    if found is None or not saved.since:
        return found
    since = layers.get(saved.since)
    if since is None:
        raise ConfigurationError(
            f"{saved.since!r}, whose input a graft at {saved.name!r} reads, is not a layer of this "
            "model"
        )
    return replace(found, features_in=since.features_in, in_shape=since.in_shape)


def take_back(model: nn.Module, receipts: Sequence[Receipt], slotted: set[str]) -> None:
    """Reverts :func:`rebuild`; ``slotted`` are the layers that had a slot before it."""
    for receipt in reversed(receipts):
        receipt.undo_here(hard=False)
    remove_slots(model, {name for name, _, _ in slots(model)} - slotted)


def optimizer_state_by_name(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state by parameter name, not position; refers to live tensors.

    Raises:
        ConfigurationError: the optimizer holds a tensor that is not in the model.
    """
    inner = unwrap_optimizer(optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {**_without_params(group), "params": [_name(names, p) for p in group["params"]]}
        for group in inner.param_groups
    ]
    state = {_name(names, parameter): dict(held) for parameter, held in inner.state.items()}
    return {"state": state, "groups": groups}


def load_optimizer_state_by_name(model: nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    """Inverse of :func:`optimizer_state_by_name`, for an optimizer with the same groups.

    The groups may be in another order. Nothing is changed when it raises.

    Raises:
        ConfigurationError: no group has exactly the tensors of a saved group, or a state does not
            fit its tensor.
    """
    inner = unwrap_optimizer(optimizer)
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    here = {frozenset(_name(names, p) for p in g["params"]): g for g in inner.param_groups}
    there = {frozenset(group["params"]): group for group in saved["groups"]}
    if here.keys() != there.keys():
        unknown = sorted(set().union(*(here.keys() ^ there.keys())))
        raise ConfigurationError(
            f"the optimizer's groups differ from the saved ones: {', '.join(unknown[:5])}"
        )
    state = {
        name: {key: _state_of(key, value, parameters[name]) for key, value in values.items()}
        for name, values in saved["state"].items()
    }
    for names_of_group, group in there.items():
        _check_numbers(here[names_of_group], group)
    for names_of_group, group in there.items():
        here[names_of_group].update(copy.deepcopy(_without_params(group)))
    inner.state.clear()
    for name, values in state.items():
        inner.state[parameters[name]] = values


def companion_states_by_name(model: nn.Module, optimizer: Any) -> list[dict[str, Any]]:
    """:func:`optimizer_state_by_name` of each companion of ``optimizer``."""
    return [optimizer_state_by_name(model, c.optimizer) for c in companions_of(optimizer)]


def load_companion_states_by_name(
    model: nn.Module, optimizer: Any, saved: Sequence[dict[str, Any]]
) -> None:
    """Inverse of :func:`companion_states_by_name`, after the grafts were rebuilt, in any order.

    Raises:
        ConfigurationError: the companions train other tensors, or a state does not fit its tensor.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    here = {frozenset(_name(names, p) for p in c.parameters): c for c in companions_of(optimizer)}
    there = {
        frozenset(n for group in state["groups"] for n in group["params"]): state for state in saved
    }
    if here.keys() != there.keys():
        unknown = sorted(set().union(*(here.keys() ^ there.keys())))
        raise ConfigurationError(
            f"the saved optimizers of grafts train other tensors: {', '.join(unknown[:5])}"
        )
    for trained, companion in here.items():
        load_optimizer_state_by_name(model, companion.optimizer, there[trained])


def _rebuild_one(model: nn.Module, record: GraftRecord, surroundings: Surroundings) -> Receipt:
    blueprint = get_blueprint(record.blueprint)
    host = find_host(model, record.layer.name)
    if graft_at(model, record.layer.name, record.blueprint) is not None:
        raise GraftError(
            f"{record.layer.name!r} carries {record.blueprint} already", layer=record.layer.name
        )
    device = next((p.device for p in host.parameters()), None)
    graft = blueprint.build(record.layer, record.config, seed=record.seed, device=device)
    graft.train(host.training)
    before = Frozen.hashed(model)
    companion = insert_graft(model, record, graft, surroundings)
    return Receipt(
        layer=record.layer.name,
        step=record.step,
        record=record,
        pause_ms=0.0,
        _before=before,
        _after=Frozen.hashed(model),
        _model=model,
        _graft=graft,
        _surroundings=surroundings,
        _companion=companion,
    )


def _check_version(record: GraftRecord, blueprint: Blueprint, other_versions: bool) -> None:
    if record.version != blueprint.version and not other_versions:
        raise ConfigurationError(
            f"{blueprint.slug} was version {record.version} when it was saved, here it is "
            f"{blueprint.version}; pass other_versions=True to load it anyway"
        )


def _check_layer(saved: LayerInfo, here: LayerInfo | None) -> None:
    """A saved description defines the size of a graft, so it must describe this model."""
    if here is None:
        raise ConfigurationError(f"{saved.name!r} is not a layer of this model")
    for what in ("kind", "dtype", "parameters", "features_in", "features_out"):
        mine, theirs = getattr(here, what), getattr(saved, what)
        if mine and mine != theirs:  # empty where only a forward pass would show it
            raise ConfigurationError(
                f"the saved {saved.name!r} has {what} {theirs!r}, here it has {mine!r}"
            )
    largest = (saved.features_out, *([] if saved.since else [saved.features_in]))
    if max(*largest, *saved.kernel_size, 0) > here.parameters:
        raise ConfigurationError(
            f"the saved {saved.name!r} does not fit: it is larger than the layer"
        )


def _check_whole_model(saved: LayerInfo, here: LayerInfo) -> None:
    """Parameters are not compared: the saved count includes grafts that are not built yet."""
    if saved.kind != here.kind:
        raise ConfigurationError(f"the saved model as a whole is a {saved.kind!r}")
    if not here.graftable:
        raise ConfigurationError(f"no gradient reduction fits here: {here.reason}")


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _name(names: dict[int, str], parameter: Tensor) -> str:
    if id(parameter) not in names:
        raise ConfigurationError("the optimizer holds a tensor that is not in the model")
    return names[id(parameter)]


def _check_numbers(here: dict[str, Any], saved: dict[str, Any]) -> None:
    for key, value in here.items():
        number = isinstance(value, int | float)
        if number and not isinstance(saved.get(key, value), int | float | Tensor):
            raise ConfigurationError(f"the saved {key} of a parameter group is not a number")


def _state_of(key: str, value: Any, parameter: Tensor) -> Any:
    misfit = isinstance(value, Tensor) and value.shape != parameter.shape
    if misfit and key in _SHAPED_LIKE_THE_PARAMETER:
        raise ConfigurationError(
            f"the saved {key} has shape {tuple(value.shape)}, its tensor {tuple(parameter.shape)}"
        )
    near = _near(value, parameter)
    return spread_like(near, parameter) if isinstance(near, Tensor) else near


def _near(value: Any, parameter: Tensor) -> Any:
    """A copy of saved state on its parameter's device; Adam's ``step`` keeps its device."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    device = parameter.device if value.dim() else value.device
    return value.detach().clone().to(device) if value.device != device else value.clone()
