"""Applies a graft to a live model.

    check → snapshot of the layer → build → certify on the side → snapshot of the rest → swap in →
    companion optimizer
An exception at any point leaves model, optimizer and random streams as they were. Where the model
has replicas, all ranks apply the graft, or none does (:mod:`esper.grafting.ranks.replicas`).
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import Blueprint, Graft, get_blueprint
from esper.blueprints.gradient_reduction import GradientReduction
from esper.contracts import Certificate, LayerInfo
from esper.exceptions import CertificateError, IncompatibleLayerError
from esper.grafting.changes.certify import certify, sample_input
from esper.grafting.companions.companion import Companion, accompany
from esper.grafting.compiled import anything_was_compiled, make_room_for_graft
from esper.grafting.copies import let_follow
from esper.grafting.manifest import GraftRecord
from esper.grafting.optimizers import optimizer_of
from esper.grafting.pauses import without_collection
from esper.grafting.ranks.communication_hooks import certify_reduction
from esper.grafting.ranks.replicas import Joint, RankGroup, jointly
from esper.grafting.ranks.sharded import announce_gradients, as_computed
from esper.grafting.receipts import Receipt
from esper.grafting.slot import (
    find_host,
    prepare_slots,
    remove_slots,
    settle_spans,
    slot_of,
    take_out,
)
from esper.grafting.snapshots.snapshot import Snapshot, SnapshotMemory, own_change
from esper.grafting.state_dicts import follow_loads, follow_whole_states
from esper.grafting.surroundings import BARE, Surroundings
from esper.grafting.tensors.random_streams import RandomStreams


@without_collection()
def apply_graft(
    model: nn.Module,
    layer: LayerInfo,
    blueprint: Blueprint,
    *,
    config: dict[str, Any] | None = None,
    surroundings: Surroundings = BARE,
    x: Tensor | None = None,
    graft: Graft | None = None,
    seed: int = 0,
    adaptation: str = "",
    step: int = -1,
    thorough: bool = False,
    memory: SnapshotMemory | None = None,
) -> Receipt:
    """Grafts ``blueprint`` into one layer of a live model, at a step boundary.

    Args:
        config: settings that differ from the blueprint's defaults.
        surroundings: what trains the model. Where that includes other ranks, each of them must call
            this with the same arguments.
        x: a real input of the layer for the certificate; None: a generated one.
        graft: built beforehand from the same config and seed, for example in the background.
        adaptation: id of the adaptation that the graft belongs to.
        step: optimizer step, for the record.
        thorough: spend more time on the certificate; see :func:`certify`.
        memory: reserved for the snapshot, which shortens the pause.

    Raises:
        UnknownLayerError: the model has no such layer.
        IncompatibleLayerError: the blueprint does not fit, or the layer has this blueprint already.
        ConfigurationError: a setting is unknown or out of range.
        CertificateError: the trial showed that the graft violates the graft contract.
        ReplicaError: another rank could not apply it.
        Any error above leaves the model, the optimizers and the random streams as they were.
    """
    apply = partial(
        _apply,
        model,
        layer,
        blueprint,
        config or {},
        surroundings,
        x=x,
        graft=graft,
        seed=seed,
        adaptation=adaptation,
        step=step,
        thorough=thorough,
        memory=memory,
    )
    if surroundings.replicas is None:
        return apply(Joint(None))
    with jointly(surroundings.replicas) as joint:
        return apply(joint)


def _apply(
    model: nn.Module,
    layer: LayerInfo,
    blueprint: Blueprint,
    config: dict[str, Any],
    surroundings: Surroundings,
    joint: Joint,
    *,
    x: Tensor | None,
    graft: Graft | None,
    seed: int,
    adaptation: str,
    step: int,
    thorough: bool,
    memory: SnapshotMemory | None,
) -> Receipt:
    started = time.perf_counter()
    host = find_host(model, layer.name)
    full = blueprint.config_for(layer, config)
    _refuse(host, layer, blueprint, surroundings)
    had_slot = _slotted(model, layer)
    # The certificate runs this layer only. On a GPU its readings would wait for the copies of the
    # whole model to the host, so these begin behind it.
    first = host if surroundings.replicas is None else None
    snapshot = Snapshot.take(model, surroundings, memory, first=first)
    try:
        joint.ready()
        with own_change(model):
            snapshot.follow()
            with _whole(host, surroundings):
                fresh = graft if graft is not None else _build(host, layer, blueprint, full, seed)
                fresh.train(host.training)
                _inherit(host, layer, blueprint, fresh)
                _refuse_graft(fresh, layer, blueprint, surroundings)
                joint.share(fresh)
                record = GraftRecord(
                    adaptation=adaptation,
                    layer=layer,
                    blueprint=blueprint.slug,
                    version=blueprint.version,
                    config=full,
                    seed=seed,
                    step=step,
                    certificate=_certify(
                        host,
                        layer,
                        blueprint,
                        full,
                        fresh,
                        x,
                        snapshot.streams,
                        thorough=thorough,
                        replicas=surroundings.replicas,
                    ),
                )
            snapshot.complete()
            before = snapshot.freeze(model)
            companion = insert_graft(model, record, fresh, surroundings)
            let_follow(model, surroundings.copies)
            receipt = Receipt(
                layer=layer.name,
                step=step,
                record=record,
                pause_ms=math.nan,
                _before=before,
                _after=snapshot.freeze(model),
                _model=model,
                _graft=fresh,
                _surroundings=surroundings,
                _companion=companion,
                _snapshot=snapshot,
            )
            follow_whole_states(model)
            joint.commit()
        receipt.pause_ms = (time.perf_counter() - started) * 1e3
        return receipt
    except BaseException:
        if not joint.done:
            _withdraw(model, layer, blueprint.slug, had_slot)
            snapshot.restore()
            let_follow(model, surroundings.copies)
        raise


def insert_graft(
    model: nn.Module, record: GraftRecord, graft: Graft, surroundings: Surroundings
) -> Companion | None:
    """Inserts a graft, and lets it train beside the layer's optimizer; on an error, neither."""
    host = find_host(model, record.layer.name)
    had_slot = _slotted(model, record.layer)
    try:
        prepare_slots(model, [record.layer.name], until_empty=True)
        slot = slot_of(host)
        assert slot is not None
        if surroundings.replicas is not None:
            graft = surroundings.replicas.spread(host, graft)
        slot.insert(record, graft)
        settle_spans(model)
        graft.attach(host)  # compiled code does not
        make_room_for_graft()
        companion = _accompany(host, record, graft, surroundings)
        if companion is not None:
            announce_gradients(graft, companion)
        follow_loads(model, host, record.blueprint, _leaving(model, companion, surroundings))
        return companion
    except BaseException:
        _withdraw(model, record.layer, record.blueprint, had_slot)
        raise


def _leaving(
    model: nn.Module, companion: Companion | None, surroundings: Surroundings
) -> Callable[[], None]:
    """For a graft that a loaded state takes out."""
    living = weakref.ref(model)  # the graft is part of it

    def leave() -> None:
        if companion is not None:
            companion.leave()
        found = living()
        if found is None:
            return
        settle_spans(found)
        if surroundings.copies:
            let_follow(found, surroundings.copies)

    return leave


def _accompany(
    host: nn.Module, record: GraftRecord, graft: Graft, surroundings: Surroundings
) -> Companion | None:
    parameters = [p for p in graft.parameters() if p.requires_grad]
    optimizer = optimizer_of(surroundings.optimizers, host)
    if not parameters or optimizer is None:
        return None
    return accompany(
        optimizer,
        parameters,
        layer=record.layer.name,
        host=host,
        others=surroundings.optimizers,
        amplification=max(
            part.amplification for part in graft.modules() if isinstance(part, Graft)
        ),
        scaler=surroundings.scaler,
    )


def _refuse(
    host: nn.Module, layer: LayerInfo, blueprint: Blueprint, surroundings: Surroundings
) -> None:
    slot = slot_of(host)
    present = set(slot.grafts()) if slot is not None else set()
    scaler = surroundings.scaler
    replicas = surroundings.replicas
    reason = surroundings.why_unchangeable()
    if replicas is not None:
        reason = reason or blueprint.replicas_refusal or replicas.why_not_at(host)
    reason = reason or _why_no_span_here(layer, surroundings)
    if reason:
        pass
    elif (blueprint.trainable or blueprint.requires) and replicas is None and _ranks() > 1:
        # DDP does not synchronise tensors that are added later: the replicas would differ, and
        # nothing would report it.
        reason = (
            "the run trains on several ranks, which would not synchronise new weights; "
            "give esper.attach the DistributedDataParallel model"
        )
    elif blueprint.slug in present:
        reason = "the layer has this blueprint already"
    elif clashing := _clashing(blueprint, present):
        reason = f"it conflicts with {', '.join(clashing)}"
    elif blueprint.requires and not present & blueprint.requires:
        reason = f"it needs {' or '.join(sorted(blueprint.requires))} on the layer first"
    elif scaler is not None and scaler.is_enabled():
        reason = blueprint.scaler_refusal
        if replicas is not None and replicas.layout is not None:
            reason = "a GradScaler cannot unscale weights that fully_shard spreads; use bfloat16"
    if reason:
        raise IncompatibleLayerError(layer=layer.name, blueprint=blueprint.slug, reason=reason)


def _why_no_span_here(layer: LayerInfo, surroundings: Surroundings) -> str:
    replicas = surroundings.replicas
    if not layer.since:
        return ""
    if replicas is not None and replicas.layout is not None:
        return "fully_shard converts and frees tensors between its layers; graft beside one layer"
    if layer.recomputed and anything_was_compiled():
        return (
            "torch.compile lets no value leave a layer that activation checkpointing recomputes; "
            "graft beside one layer"
        )
    return ""


def _refuse_graft(
    graft: Graft, layer: LayerInfo, blueprint: Blueprint, surroundings: Surroundings
) -> None:
    reason = "" if surroundings.replicas is None else surroundings.replicas.why_not_this(graft)
    if reason:
        raise IncompatibleLayerError(layer=layer.name, blueprint=blueprint.slug, reason=reason)


def _whole(host: nn.Module, surroundings: Surroundings) -> AbstractContextManager[None]:
    replicas = surroundings.replicas
    return nullcontext() if replicas is None else replicas.whole(host)


def _clashing(blueprint: Blueprint, present: set[str]) -> list[str]:
    """The layer's grafts that conflict with it, as declared by either blueprint."""
    return sorted(
        slug
        for slug in present
        if slug in blueprint.conflicts or blueprint.slug in get_blueprint(slug).conflicts
    )


def _ranks() -> int:
    distributed = torch.distributed
    ready: Callable[[], bool] = distributed.is_initialized
    return int(distributed.get_world_size()) if distributed.is_available() and ready() else 1


def _build(
    host: nn.Module, layer: LayerInfo, blueprint: Blueprint, config: dict[str, Any], seed: int
) -> Graft:
    device = next((p.device for p in host.parameters()), None)
    return blueprint.build(layer, config, seed=seed, device=device)


def _inherit(host: nn.Module, layer: LayerInfo, blueprint: Blueprint, graft: Graft) -> None:
    try:
        graft.inherit(host)
    except TypeError as error:
        raise IncompatibleLayerError(
            layer=layer.name, blueprint=blueprint.slug, reason=str(error)
        ) from error


def _certify(
    host: nn.Module,
    layer: LayerInfo,
    blueprint: Blueprint,
    config: dict[str, Any],
    graft: Graft,
    x: Tensor | None,
    streams: RandomStreams,
    *,
    thorough: bool,
    replicas: RankGroup | None,
) -> Certificate:
    if isinstance(graft, GradientReduction):
        assert replicas is not None  # without replicas no layer supports it
        certificate = certify_reduction(layer, blueprint, graft, replicas.group)
    else:
        tried = as_computed(host, graft)
        sample = sample_input(layer) if x is None else x
        if tried is not graft and sample.is_floating_point():
            sample = sample.to(next(tried.parameters()).dtype)
        certificate = certify(
            host,
            layer,
            blueprint,
            tried,
            sample,
            config=config,
            streams_before=streams,
            thorough=thorough,
        )
    if not certificate.passed:
        raise CertificateError(layer=layer.name, certificate=certificate)
    return certificate


def _withdraw(model: nn.Module, layer: LayerInfo, slug: str, had_slot: dict[str, bool]) -> None:
    """Removes what a failed insertion left behind."""
    take_out(model, layer.name, slug)
    remove_slots(model, [name for name, had in had_slot.items() if not had])


def _slotted(model: nn.Module, layer: LayerInfo) -> dict[str, bool]:
    """Layer -> it has a slot, of the layers where the graft needs one."""
    names = [layer.name, *([layer.since] if layer.since else [])]
    return {name: slot_of(find_host(model, name)) is not None for name in names}
