"""The structure manifest: what was grafted where, so that a checkpoint can be loaded again.

Order of a restore: :func:`rebuild` the grafts, ``model.load_state_dict``, then
:func:`load_optimizer_state_by_name`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from esper.blueprints import Blueprint, get
from esper.contracts import Certificate, LayerInfo
from esper.exceptions import ConfigurationError, GraftError
from esper.grafting import ledger
from esper.grafting.apply import Receipt, Surroundings, insert_graft
from esper.grafting.replicas import Replicas, jointly
from esper.grafting.slot import GraftRecord, find_host, slots
from esper.grafting.snapshot import Frozen


def structure(model: nn.Module) -> list[dict[str, Any]]:
    """The grafts in the model as JSON values, in the order in which a layer runs them."""
    return [
        {
            "adaptation": record.adaptation,
            "layer": record.layer.to_wire(),
            "blueprint": record.blueprint,
            "version": record.version,
            "config": record.config,
            "seed": record.seed,
            "step": record.step,
            "alpha": None if graft.alpha is None else float(graft.alpha),
            "certificate": record.certificate.to_wire(),
        }
        for _, _, slot in slots(model)
        for record, graft in zip(slot.records.values(), slot.grafts().values(), strict=True)
    ]


def rebuild(
    model: nn.Module,
    manifest: Sequence[dict[str, Any]],
    optimizers: Sequence[Any] = (),
    schedulers: Sequence[Any] = (),
    *,
    other_versions: bool = False,
    replicas: Replicas | None = None,
) -> tuple[Receipt, ...]:
    """Makes the grafts of a manifest again, each from its seed, for a state dict to be loaded.

    Args:
        other_versions: take a blueprint whose source has changed since.
        replicas: the other ranks of the model; each of them must call this with the same manifest.

    Returns:
        Receipts that can be undone softly; there is no snapshot from before.

    Raises:
        ConfigurationError: not a manifest, or a blueprint's source has changed.
        UnknownBlueprintError, UnknownLayerError: they do not exist here.
    """
    records = [_read_record(entry) for entry in manifest]
    for record in records:
        _check_version(record, get(record.blueprint), other_versions)
        find_host(model, record.layer.name)
    surroundings = Surroundings(optimizers, schedulers, replicas=replicas)
    with jointly(replicas) as joint:
        receipts = tuple(_rebuild_one(model, record, surroundings) for record in records)
        joint.commit()
    return receipts


def optimizer_state_by_name(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state with parameter names in place of positions; holds live tensors.

    Raises:
        ConfigurationError: the optimizer holds a tensor that is not in the model.
    """
    inner = ledger.unwrap_optimizer(optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {**_without_params(group), "params": [_name(names, p) for p in group["params"]]}
        for group in inner.param_groups
    ]
    state = {_name(names, parameter): dict(held) for parameter, held in inner.state.items()}
    return {"state": state, "groups": groups}


def load_optimizer_state_by_name(model: nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    """Inverse of :func:`optimizer_state_by_name`, for an optimizer with the same groups.

    The groups may stand in another order. Nothing is changed when it raises.

    Raises:
        ConfigurationError: no group here holds just the tensors of a saved group.
    """
    inner = ledger.unwrap_optimizer(optimizer)
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    here = {frozenset(_name(names, p) for p in g["params"]): g for g in inner.param_groups}
    there = {frozenset(group["params"]): group for group in saved["groups"]}
    if here.keys() != there.keys():
        strangers = sorted(set().union(*(here.keys() ^ there.keys())))
        raise ConfigurationError(
            f"the optimizer's groups differ from the saved ones: {', '.join(strangers[:5])}"
        )
    for held, group in there.items():
        here[held].update(copy.deepcopy(_without_params(group)))
    inner.state.clear()
    for name, values in saved["state"].items():
        parameter = parameters[name]
        inner.state[parameter] = {k: _near(v, parameter) for k, v in values.items()}


def _rebuild_one(model: nn.Module, record: GraftRecord, surroundings: Surroundings) -> Receipt:
    blueprint = get(record.blueprint)
    host = find_host(model, record.layer.name)
    if record.blueprint in {record.blueprint for _, h, s in slots(model) if h is host
                            for record in s.records.values()}:  # fmt: skip
        raise GraftError(
            f"{record.layer.name!r} carries {record.blueprint} already", layer=record.layer.name
        )
    device = next((p.device for p in host.parameters()), None)
    graft = blueprint.build(record.layer, record.config, seed=record.seed, device=device)
    graft.train(host.training)
    before = Frozen.of(model)
    group = insert_graft(model, record, graft, surroundings)
    return Receipt(
        record=record,
        pause_ms=0.0,
        _before=before,
        _after=Frozen.of(model),
        _model=model,
        _graft=graft,
        _surroundings=surroundings,
        _group=group,
    )


def _read_record(entry: dict[str, Any]) -> GraftRecord:
    try:
        return GraftRecord(
            adaptation=str(entry["adaptation"]),
            layer=LayerInfo.from_wire(entry["layer"]),
            blueprint=str(entry["blueprint"]),
            version=str(entry["version"]),
            config=dict(entry["config"]),
            seed=int(entry["seed"]),
            step=int(entry["step"]),
            certificate=Certificate.from_wire(entry["certificate"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"not an entry of a structure manifest: {error}") from error


def _check_version(record: GraftRecord, blueprint: Blueprint, other_versions: bool) -> None:
    if record.version != blueprint.version and not other_versions:
        raise ConfigurationError(
            f"{blueprint.slug} was version {record.version} when it was saved, here it is "
            f"{blueprint.version}; pass other_versions=True to load it all the same"
        )


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _name(names: dict[int, str], parameter: Tensor) -> str:
    if id(parameter) not in names:
        raise ConfigurationError("the optimizer holds a tensor that is not in the model")
    return names[id(parameter)]


def _near(value: Any, parameter: Tensor) -> Any:
    """A copy of saved state beside its parameter; Adam's ``step`` stays where it was made."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    device = parameter.device if value.dim() else value.device
    return value.detach().clone().to(device) if value.device != device else value.clone()
