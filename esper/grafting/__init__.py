"""Grafts in a model that trains: applied, certified, undone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from esper.blueprints import get_blueprint
from esper.console import Console
from esper.contracts import LayerInfo
from esper.contracts.spans import span, why_no_span
from esper.exceptions import IncompatibleLayerError, UnknownLayerError
from esper.fail_closed import contained
from esper.grafting.changes.apply import apply_graft
from esper.grafting.changes.certify import certify, sample_input, stand_in
from esper.grafting.changes.loading import build_grafts_of_loaded_states, load_state_dict
from esper.grafting.changes.structure import (
    check_manifest,
    companion_states_by_name,
    load_companion_states_by_name,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    rebuild,
    structure,
    take_back,
)
from esper.grafting.companions.companion import accompany, companions_of
from esper.grafting.copies import audit_copies, bare_copy, check_copy, let_follow
from esper.grafting.found_copies.search import Copies
from esper.grafting.guard import (
    GradientGuard,
    GuardVerdict,
    LossGuard,
    non_finite_gradients,
    weights_are_finite,
)
from esper.grafting.layers.graph import NEVER_RAN, LayerRecorder, trace_layers, why_never_graftable
from esper.grafting.manifest import GraftRecord
from esper.grafting.ranks.replicas import RankGroup, Replicas
from esper.grafting.ranks.sharded import ShardedRanks
from esper.grafting.receipts import ChangeReceipt, Receipt, RemedyReceipt, UndoReceipt
from esper.grafting.slot import (
    Slot,
    find_host,
    prepare_slots,
    remove_slots,
    slot_of,
    slots,
    watch,
)
from esper.grafting.snapshots.snapshot import Snapshot, SnapshotMemory
from esper.grafting.surroundings import Surroundings
from esper.grafting.tensors.digests import digest
from esper.grafting.trained_tensors.hidden_layers import HiddenLayers
from esper.grafting.trained_tensors.ledger import audit
from esper.grafting.trained_tensors.movement import MovementWatch
from esper.near_names import or_known

__all__ = [
    "ChangeReceipt",
    "GradientGuard",
    "GraftRecord",
    "GuardVerdict",
    "HiddenLayers",
    "LayerRecorder",
    "LossGuard",
    "MovementWatch",
    "RankGroup",
    "Receipt",
    "RemedyReceipt",
    "Replicas",
    "ShardedRanks",
    "Slot",
    "Snapshot",
    "SnapshotMemory",
    "Surroundings",
    "UndoReceipt",
    "accompany",
    "apply_graft",
    "audit",
    "audit_copies",
    "bare_copy",
    "build_grafts_of_loaded_states",
    "certify",
    "check_copy",
    "check_manifest",
    "companion_states_by_name",
    "companions_of",
    "describe_layer",
    "digest",
    "find_host",
    "graft",
    "let_follow",
    "load_companion_states_by_name",
    "load_optimizer_state_by_name",
    "load_state_dict",
    "non_finite_gradients",
    "optimizer_state_by_name",
    "prepare_slots",
    "rebuild",
    "remove_slots",
    "sample_input",
    "slot_of",
    "slots",
    "span_of",
    "stand_in",
    "structure",
    "take_back",
    "trace_layers",
    "watch",
    "weights_are_finite",
]


NOT_SAID: Final[Any] = object()  # an argument that was left out, where None has a meaning


def graft(
    model: nn.Module,
    layer: str,
    blueprint: str,
    *,
    since: str = "",
    optimizer: Any = NOT_SAID,
    sample: Any = None,
    **config: Any,
) -> Receipt:
    """Grafts a blueprint into a layer, without a run.

    An ``AveragedModel`` of the model gets the graft too.

    Args:
        layer: name of the layer, as in ``model.named_modules()``.
        blueprint: slug or id.
        since: name of an earlier layer, whose input the graft reads, for a graft that spans layers:
            over ``fc1`` … ``fc2`` a feed-forward branch is more hidden units. Needs ``sample``.
        optimizer: trains the layer. The new weights get a companion, which steps with it. Without
            one nothing trains them, which is said on the console; ``optimizer=None`` says that you
            add ``receipt.graft.parameters()`` to an optimizer of your own.
        sample: model input (a tensor, a tuple of arguments or a dict of keyword arguments) that is
            run once, without gradients, to trace the layer's shapes. Needed for layers whose
            weights do not define them (convolutions) and for blueprints that need a sequence.
        config: settings of the blueprint.

    Returns:
        A receipt; ``receipt.undo()`` restores the model and the optimizer.

    Raises:
        UnknownLayerError: there is no such layer, or its shapes are unknown without ``sample``.
        IncompatibleLayerError: as :func:`apply_graft`; or the script keeps an average by hand.
        CertificateError, ConfigurationError: as :func:`apply_graft`.
    """
    entry = get_blueprint(blueprint)
    info = _look_up(model, layer, sample)
    if since:
        info = _span(model, layer, entry.slug, since, sample)
    given = optimizer is not None and optimizer is not NOT_SAID
    copies = _copies_of(model)
    if copies is not None and (reason := copies.by_hand.reason(layer)):
        raise IncompatibleLayerError(layer=layer, blueprint=entry.slug, reason=reason)
    receipt = apply_graft(
        model,
        info,
        entry,
        config=config,
        surroundings=Surroundings(
            (optimizer,) if given else (), copies=() if copies is None else copies
        ),
        thorough=True,
    )
    if optimizer is NOT_SAID and any(p.requires_grad for p in receipt.graft.parameters()):
        Console(enabled=True).say(
            f"nothing trains the new weights of {receipt.blueprint} in {layer!r}: pass optimizer= "
            "to esper.graft, or optimizer=None where you add receipt.graft.parameters() yourself",
            level=logging.WARNING,
        )
    return receipt


@contained("look for running averages of the model", "They do not get the graft.")
def _copies_of(model: nn.Module) -> Copies | None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None  # comparing weights that are spread over ranks would be a collective call
    copies = Copies(model)
    copies.search()
    copies.by_hand.let_go()
    copies.settle_averaged()
    return copies


def describe_layer(model: nn.Module, layer: str, sample: Any) -> tuple[LayerInfo, list[str]]:
    """A layer of a model without a run, and the slugs of its grafts; raises as :func:`graft`."""
    info, slot = _look_up(model, layer, sample), slot_of(find_host(model, layer))
    return info, list(slot.grafts()) if slot is not None else []


def _span(model: nn.Module, layer: str, blueprint: str, since: str, sample: Any) -> LayerInfo:
    _look_up(model, since, sample)
    layers = {info.name: info for info in _trace(model, sample)}
    return span_of(layers, since, layer, blueprint)


def span_of(layers: Mapping[str, LayerInfo], since: str, layer: str, blueprint: str) -> LayerInfo:
    """The place of a graft that reads the input of ``since``, among the layers of a model.

    Raises:
        UnknownLayerError: there is no such layer.
        IncompatibleLayerError: no graft can span them.
    """
    for name in (since, layer):
        if name not in layers:
            raise UnknownLayerError(
                f"the model has no layer {name!r}{or_known(name, layers)}", layer=name
            )
    reason = why_no_span(layers[since], layers[layer])
    if reason:
        raise IncompatibleLayerError(layer=layer, blueprint=blueprint, reason=reason)
    return span(layers[since], layers[layer])


def _trace(model: nn.Module, sample: Any) -> tuple[LayerInfo, ...]:
    return trace_layers(model, None if sample is None else lambda: _run(model, sample))


def _look_up(model: nn.Module, layer: str, sample: Any) -> LayerInfo:
    find_host(model, layer)
    found = next((info for info in _trace(model, sample) if info.name == layer), None)
    if found is None or (sample is None and found.reason == NEVER_RAN):
        reason = why_never_graftable(model, layer) or "its shapes are not known; pass sample="
        raise UnknownLayerError(f"cannot graft into {layer!r}: {reason}", layer=layer)
    return found


def _run(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, dict):
        return model(**sample)
    return model(*sample) if isinstance(sample, tuple | list) else model(sample)
