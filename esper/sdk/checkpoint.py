"""The changed model in a checkpoint: which grafts and remedies, their weights, optimizer state.

Structure first: a checkpoint is loaded into a fresh model, whose grafts are rebuilt before any
weight is loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from esper import grafting
from esper.exceptions import ConfigurationError
from esper.grafting import Receipt, RemedyReceipt, Surroundings, remedies
from esper.grafting.manifest import MANIFEST_KEY
from esper.grafting.ranks.replicas import Joint
from esper.grafting.snapshots.snapshot import Snapshot
from esper.grafting.state_dicts import keys_of_grafts
from esper.remedies import Stop, Target, get_remedy, list_remedies, resume_remedy
from esper.sdk.adaptation import Adaptation
from esper.sdk.changes import Changes
from esper.sharding import gathered, spread_like


def state_of(model: nn.Module, surroundings: Surroundings, changes: Changes) -> dict[str, Any]:
    """Structure, weights of the grafts, optimizer state by parameter name, and what is applied.

    Without the host's optimizer state of a model that is spread over ranks: the script's own
    checkpoint has it. Grafts in such a model are gathered whole, a collective call.
    """
    sharded = is_sharded(surroundings)
    if sharded and changes.grafted and surroundings.replicas is not None:
        surroundings.replicas.settle()
    return {
        "structure": grafting.structure(model),
        "grafts": gathered(_graft_tensors(model)),
        "optimizers": [
            None if sharded else _optimizer_state(model, entry) for entry in surroundings.optimizers
        ],
        "companions": [
            _companion_states(model, entry, sharded=sharded) for entry in surroundings.optimizers
        ],
        "applied": [entry.to_state() for entry in changes.grafted],
        "remedies": [
            {
                "remedy": r.remedy,
                "layer": r.layer,
                "details": r.details,
                "adaptation": r.adaptation,
                "step": r.step,
            }
            for r in changes.remedies
        ],
    }


def load(
    model: nn.Module,
    surroundings: Surroundings,
    state: dict[str, Any],
    joint: Joint,
    stop: Stop,
) -> tuple[list[Adaptation], list[RemedyReceipt]]:
    """Rebuild what :func:`state_of` described, in a model that has no grafts yet.

    All of it or nothing: on any error model, optimizers and schedulers are as before.

    Args:
        joint: what the caller does on all ranks, or on none; committed here.
        stop: where the loop was asked to stop, it is asked again.

    Raises:
        ConfigurationError: the state has another number of optimizers.
        Any other error that a state can cause which is not of this model.
    """
    optimizers = surroundings.optimizers
    if len(state["optimizers"]) != len(optimizers):
        raise ConfigurationError("the state is of another number of optimizers")
    if is_sharded(surroundings):
        _refuse_changes(state, surroundings)
        if not state["structure"]:
            joint.commit()
            return [], []
    slotted = {name for name, _, _ in grafting.slots(model)}
    without_copies = replace(surroundings, copies=())  # they follow at the end
    snapshot = Snapshot.take(model, without_copies)
    rebuilt: tuple[Receipt, ...] = ()
    repeated: list[RemedyReceipt] = []
    try:
        rebuilt = grafting.rebuild(model, state["structure"], surroundings)
        for entry in state["remedies"]:
            receipt = _repeat(model, without_copies, entry, stop)
            repeated += [] if receipt is None else [receipt]
        _load_grafts(model, state["grafts"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            if saved is not None:
                grafting.load_optimizer_state_by_name(model, optimizer, saved)
        for optimizer, companions in zip(optimizers, state["companions"], strict=True):
            grafting.load_companion_states_by_name(model, optimizer, companions)
        adaptations = _adaptations(state["applied"], rebuilt)
        grafting.let_follow(model, surroundings.copies)
        joint.commit()
    except BaseException:
        if not joint.done:
            for receipt in repeated:
                receipt.end()
            grafting.take_back(model, rebuilt, slotted)
            snapshot.restore()
        raise
    return adaptations, repeated


def is_sharded(surroundings: Surroundings) -> bool:
    """The model's parameters are spread over ranks."""
    return surroundings.replicas is not None and surroundings.replicas.layout is not None


def _refuse_changes(state: dict[str, Any], surroundings: Surroundings) -> None:
    """A model that takes no graft, or no remedy, takes none out of a checkpoint either."""
    reason = surroundings.why_unchangeable() if state["structure"] else ""
    for entry in state["remedies"]:
        remedy = next((r for r in list_remedies() if r.slug == entry["remedy"]), None)
        parts = remedy is not None and remedy.works_on_parts
        reason = reason or (
            surroundings.why_unchangeable() if parts else surroundings.why_no_remedy()
        )
    if reason:
        raise ConfigurationError(f"the state holds grafts or remedies: {reason}")


def _adaptations(applied: list[dict[str, Any]], rebuilt: tuple[Receipt, ...]) -> list[Adaptation]:
    places = {(receipt.layer, receipt.blueprint): receipt for receipt in rebuilt}
    return [
        Adaptation.from_state(
            entry, None if entry["merged"] else places[entry["layer"], entry["blueprint"]]
        )
        for entry in applied
    ]


def _repeat(
    model: nn.Module, surroundings: Surroundings, entry: dict[str, Any], stop: Stop
) -> RemedyReceipt | None:
    """What a remedy does in each step, or did to parameter groups.

    What it did to weights is in the saved weights.
    """
    remedy, layer = entry["remedy"], entry["layer"]
    if remedy == "freeze":
        receipt = remedies.freeze(model, layer, surroundings=surroundings)
    elif remedy in {known.slug for known in list_remedies() if known.stays}:
        target = Target(model, surroundings, layer, stop=stop)
        receipt = resume_remedy(get_remedy(remedy), target, entry["details"])
    else:
        return None
    receipt.adaptation = str(entry.get("adaptation", ""))  # absent from older states
    receipt.step = int(entry.get("step", -1))
    receipt.forget_snapshot()
    return receipt


def _graft_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    if not any(True for _ in grafting.slots(model)):
        return {}  # state_dict() of FSDP is a collective call, and the script may be on one rank
    state = model.state_dict()
    names = keys_of_grafts(state)
    return {name: state[name] for name in names if not name.endswith(f".{MANIFEST_KEY}")}


def _load_grafts(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    own = _graft_tensors(model)
    if own.keys() != saved.keys():
        odd = ", ".join(sorted(own.keys() ^ saved.keys())[:5])
        raise ConfigurationError(f"the saved grafts do not fit this model: {odd}")
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape:  # copy_ would spread a single number over it
            raise ConfigurationError(
                f"the saved {name} has shape {tuple(saved[name].shape)}, here {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(spread_like(saved[name], tensor))


def _companion_states(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> list[dict[str, Any]]:
    states = grafting.companion_states_by_name(model, optimizer)
    return [gathered(state) for state in states] if sharded else states


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """By name; None for an optimizer that also trains something beside this model."""
    try:
        return grafting.optimizer_state_by_name(model, optimizer)
    except ConfigurationError:
        return None
