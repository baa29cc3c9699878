"""Putting a graft in, and taking it out again.

    check → snapshot → build → certify on the side → swap in → optimizer group
An exception anywhere leaves model, optimizer and random streams as they were. Where the model has
replicas, all of that happens on all ranks, or on none (:mod:`esper.grafting.replicas`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import Blueprint, Graft, get_blueprint
from esper.blueprints.gradient_reduction import GradientReduction
from esper.contracts import Certificate, LayerInfo
from esper.exceptions import CertificateError, IncompatibleLayerError, UndoError
from esper.grafting import ledger
from esper.grafting.certify import certify, sample_input
from esper.grafting.communication_hooks import certify_reduction
from esper.grafting.copies import let_follow
from esper.grafting.replicas import Joint, Replicas, jointly
from esper.grafting.slot import (
    GraftRecord,
    Slot,
    find_host,
    prepare_slots,
    remove_slots,
    slot_of,
    slots,
)
from esper.grafting.snapshot import Frozen, RandomStreams, Snapshot, SnapshotMemory, digest


@dataclass(frozen=True, slots=True)
class UndoReceipt:
    """What an undo did.

    Attributes:
        digest: of the model afterwards.
        exact: hard: everything equals the snapshot to the bit. Soft: False, the host has moved on.
        discarded: other grafts that went with it, as ``layer/blueprint``.
    """

    digest: str
    hard: bool
    exact: bool
    pause_ms: float
    discarded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What trains the model: everything that a snapshot must hold beside it.

    Attributes:
        replicas: the other ranks, None for a model in one process.
    """

    optimizers: Sequence[Any] = ()
    schedulers: Sequence[Any] = ()
    scaler: Any = None
    copies: Sequence[Any] = ()
    replicas: Replicas | None = None

    def snapshot(self, model: nn.Module, memory: SnapshotMemory | None = None) -> Snapshot:
        return Snapshot.take(
            model, self.optimizers, self.schedulers, self.scaler, memory, self.copies
        )


@dataclass(slots=True, eq=False)
class Receipt:
    """A graft that is in the model: what was done, and how to undo it."""

    record: GraftRecord
    pause_ms: float
    _before: Frozen = field(repr=False)
    _after: Frozen = field(repr=False)
    _model: nn.Module = field(repr=False)
    _graft: Graft = field(repr=False)
    _surroundings: Surroundings = field(repr=False)
    _group: ledger.GroupReceipt | None = field(repr=False, default=None)
    _snapshot: Snapshot | None = field(repr=False, default=None)

    @property
    def adaptation(self) -> str:
        return self.record.adaptation

    @property
    def layer(self) -> str:
        return self.record.layer.name

    @property
    def blueprint(self) -> str:
        """Slug."""
        return self.record.blueprint

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.record.config)

    @property
    def seed(self) -> int:
        return self.record.seed

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def certificate(self) -> Certificate:
        return self.record.certificate

    @property
    def digest_before(self) -> str:
        """Hex SHA-256 of the model before the graft; worked out when first asked for."""
        return self._before.digest

    @property
    def digest_after(self) -> str:
        """Hex SHA-256 of the model with the graft in it, before the next step."""
        return self._after.digest

    @property
    def graft(self) -> Graft:
        """The living module."""
        return self._graft

    @property
    def present(self) -> bool:
        """True while the graft is in the model; an older graft's hard undo takes it along."""
        return _graft_at(self._model, self.layer, self.blueprint) is self._graft

    @property
    def can_undo_hard(self) -> bool:
        return self.present and self._snapshot is not None

    def forget_snapshot(self) -> None:
        """Frees the snapshot. A hard undo is impossible from now on, a soft one is not."""
        self._drop_snapshot()

    def undo(self, hard: bool = True) -> UndoReceipt:
        """Takes the graft out.

        Soft: detaches it and keeps what the host has learnt since; grafts that cannot be without
        it go with it. Hard: brings back the state before the graft to the bit, optimizer and
        random streams included; grafts that came later go with it. Either way they are named in
        ``discarded``. Where the model has replicas, each rank must call this, and it is out on all
        of them or on none.

        Raises:
            UndoError: it is not in the model any more, the snapshot is gone (hard), or the model
                did not come back as it was.
            ReplicaError: another rank could not take it out, so it is still in.
        """
        if self._surroundings.replicas is None:
            return self.undo_here(hard)
        with undoing_everywhere(self._model, self._surroundings, self):
            return self.undo_here(hard)

    def undo_here(self, hard: bool = True) -> UndoReceipt:
        """As :meth:`undo`, on this rank alone; for a caller that brings the ranks together."""
        if not self.present:
            raise UndoError(f"{self.blueprint} is not in {self.layer!r} any more", layer=self.layer)
        return self._undo_hard() if hard else self._undo_soft()

    def _undo_soft(self) -> UndoReceipt:
        started = time.perf_counter()
        _take_out(self._model, self.layer, self.blueprint)
        if self._group is not None:
            self._group.remove()
        discarded = self._discard_helpless()
        let_follow(self._model, self._surroundings.copies)
        pause_ms = (time.perf_counter() - started) * 1e3
        self._drop_snapshot()
        return UndoReceipt(
            digest(self._model), hard=False, exact=False, pause_ms=pause_ms, discarded=discarded
        )

    def _undo_hard(self) -> UndoReceipt:
        snapshot = self._snapshot
        if snapshot is None:
            raise UndoError(
                f"the snapshot before {self.blueprint} is gone; undo it softly", layer=self.layer
            )
        started = time.perf_counter()
        gone = snapshot.grafts() - _living(self._model).keys()
        # One that was merged since comes back: the host's weights are again without it.
        merged = {graft for graft in gone if isinstance(graft, Graft) and graft.merged}
        removed_since = gone - merged
        for graft in merged:
            graft.__dict__.pop("merged")
        discarded = self._discard_later(snapshot)
        if self._group is not None:
            self._group.remove()
        snapshot.restore()
        differences = snapshot.differences()
        self._discard_revived(removed_since)
        let_follow(self._model, self._surroundings.copies)
        after = digest(self._model)
        pause_ms = (time.perf_counter() - started) * 1e3
        self._drop_snapshot()
        exact = not removed_since and after == self.digest_before
        if differences or not (exact or removed_since):
            what = ", ".join(differences) or "the model's digest"
            raise UndoError(f"not as before the graft: {what}", layer=self.layer)
        return UndoReceipt(after, hard=True, exact=exact, pause_ms=pause_ms, discarded=discarded)

    def _drop_snapshot(self) -> None:
        # The digests are worked out from the snapshot's copies, so this is their last chance.
        _ = self.digest_before, self.digest_after
        self._snapshot = None

    def _discard_helpless(self) -> tuple[str, ...]:
        """Takes out the layer's grafts whose blueprint requires what has just gone."""
        slot = _slot_at(self._model, self.layer)
        present = slot.grafts() if slot is not None else {}
        helpless = [
            slug
            for slug in present
            if (needs := get_blueprint(slug).requires) and not needs & present.keys()
        ]
        for slug in helpless:
            self._discard(present[slug], self.layer, slug)
        return tuple(f"{self.layer}/{slug}" for slug in helpless)

    def _discard(self, graft: nn.Module, layer: str, slug: str) -> None:
        _take_out(self._model, layer, slug)
        ledger.remove_groups_of(
            graft.parameters(), self._surroundings.optimizers, self._surroundings.schedulers
        )

    def _discard_later(self, snapshot: Snapshot) -> tuple[str, ...]:
        """Takes out every graft that the snapshot does not know, this one too."""
        discarded = []
        for graft, (layer, slug) in _living(self._model).items():
            if graft not in snapshot.grafts():
                _take_out(self._model, layer, slug)
                if graft is not self._graft:
                    discarded.append(f"{layer}/{slug}")
        return tuple(discarded)

    def _discard_revived(self, removed_since: set[nn.Module]) -> None:
        # An older graft that was taken out on purpose meanwhile was in the snapshot: it stays out.
        for graft, (layer, slug) in _living(self._model).items():
            if graft in removed_since:
                self._discard(graft, layer, slug)


@contextmanager
def undoing_everywhere(
    model: nn.Module, surroundings: Surroundings, receipt: Any
) -> Iterator[None]:
    """Inside, ``receipt`` is undone; where one rank cannot, all are as they were before it."""
    with jointly(surroundings.replicas) as joint:
        kept, before = receipt._snapshot, surroundings.snapshot(model)
        merged = [] if kept is None else [g for g in kept.grafts() if getattr(g, "merged", False)]
        try:
            yield
            joint.agree()
        except BaseException:
            if not joint.done:
                before.restore()
                let_follow(model, surroundings.copies)
                receipt._snapshot = kept
                for graft in merged:
                    graft.merged = True
            raise


def apply_graft(
    model: nn.Module,
    layer: LayerInfo,
    blueprint: Blueprint,
    *,
    config: dict[str, Any] | None = None,
    optimizers: Sequence[Any] = (),
    schedulers: Sequence[Any] = (),
    scaler: Any = None,
    copies: Sequence[Any] = (),
    x: Tensor | None = None,
    graft: Graft | None = None,
    seed: int = 0,
    adaptation: str = "",
    step: int = -1,
    thorough: bool = False,
    memory: SnapshotMemory | None = None,
    replicas: Replicas | None = None,
) -> Receipt:
    """Grafts ``blueprint`` into one layer of a live model, at a step boundary.

    Args:
        config: settings that differ from the blueprint's default.
        copies: running averages of the model, which get the graft too.
        x: a real input of the layer for the certificate; made up where there is none.
        graft: built before, from the same config and seed, for example in the background.
        adaptation: id of the adaptation that this is part of.
        step: optimizer step, for the record.
        thorough: spend more time on the certificate; see :func:`certify`.
        memory: reserved for the snapshot, which shortens the pause.
        replicas: the other ranks of the model; each of them must call this with the same arguments.

    Raises:
        UnknownLayerError: the model has no such layer.
        IncompatibleLayerError: the blueprint does not fit, or the layer carries it already.
        ConfigurationError: a setting is unknown or absurd.
        CertificateError: the graft broke a promise when it was tried.
        ReplicaError: another rank could not do it.
        Any error above leaves the model, the optimizers and the random streams as they were.
    """
    surroundings = Surroundings(optimizers, schedulers, scaler, copies, replicas)
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
    if replicas is None:
        return apply(Joint(None))
    with jointly(replicas) as joint:
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
    had_slot = slot_of(host) is not None
    snapshot = surroundings.snapshot(model, memory)
    try:
        before = snapshot.freeze(model)
        fresh = graft if graft is not None else _build(host, layer, blueprint, full, seed)
        fresh.train(host.training)
        _inherit(host, layer, blueprint, fresh)
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
        group = insert_graft(model, record, fresh, surroundings)
        let_follow(model, surroundings.copies)
        receipt = Receipt(
            record=record,
            pause_ms=math.nan,
            _before=before,
            _after=snapshot.freeze(model),
            _model=model,
            _graft=fresh,
            _surroundings=surroundings,
            _group=group,
            _snapshot=snapshot,
        )
        joint.commit()
        receipt.pause_ms = (time.perf_counter() - started) * 1e3
        return receipt
    except BaseException:
        if not joint.done:
            _withdraw(model, layer.name, blueprint.slug, had_slot=had_slot)
            snapshot.restore()
            let_follow(model, surroundings.copies)
        raise


def insert_graft(
    model: nn.Module, record: GraftRecord, graft: Graft, surroundings: Surroundings
) -> ledger.GroupReceipt | None:
    """Swaps a graft in and lets the layer's optimizer train it; undoes itself when it fails."""
    host = find_host(model, record.layer.name)
    had_slot = slot_of(host) is not None
    try:
        prepare_slots(model, [record.layer.name])
        slot = slot_of(host)
        assert slot is not None
        slot.insert(record, graft)
        return _join_optimizer(host, record, graft, surroundings)
    except BaseException:
        _withdraw(model, record.layer.name, record.blueprint, had_slot=had_slot)
        raise


def _join_optimizer(
    host: nn.Module, record: GraftRecord, graft: Graft, surroundings: Surroundings
) -> ledger.GroupReceipt | None:
    parameters = [p for p in graft.parameters() if p.requires_grad]
    optimizer = ledger.optimizer_of(surroundings.optimizers, host)
    if not parameters or optimizer is None:
        return None
    return ledger.add_group(
        optimizer,
        parameters,
        layer=record.layer.name,
        host=host,
        schedulers=surroundings.schedulers,
    )


def _refuse(
    host: nn.Module, layer: LayerInfo, blueprint: Blueprint, surroundings: Surroundings
) -> None:
    slot = slot_of(host)
    present = set(slot.grafts()) if slot is not None else set()
    scaler = surroundings.scaler
    replicas = surroundings.replicas
    reason = "" if replicas is None else replicas.why_not() or blueprint.replicas_refusal
    if reason:
        pass
    elif (blueprint.trainable or blueprint.requires) and replicas is None and _ranks() > 1:
        # DDP does not know tensors that came after it: the replicas would drift apart silently.
        reason = (
            "the run trains on several ranks, which would not keep new weights in step: give "
            "esper.attach the DistributedDataParallel model"
        )
    elif blueprint.slug in present:
        reason = "the layer carries it already"
    elif clashing := _clashing(blueprint, present):
        reason = f"it does not go together with {', '.join(clashing)}"
    elif blueprint.requires and not present & blueprint.requires:
        reason = f"it needs {' or '.join(sorted(blueprint.requires))} on the layer first"
    elif scaler is not None and scaler.is_enabled():
        reason = blueprint.scaler_refusal
    if reason:
        raise IncompatibleLayerError(layer=layer.name, blueprint=blueprint.slug, reason=reason)


def _clashing(blueprint: Blueprint, present: set[str]) -> list[str]:
    """Those of the layer's grafts that do not go together with it, by either's word."""
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
    replicas: Replicas | None,
) -> Certificate:
    if isinstance(graft, GradientReduction):
        assert replicas is not None  # else no layer is fit for it
        certificate = certify_reduction(layer, blueprint, graft, replicas.group)
    else:
        certificate = certify(
            host,
            layer,
            blueprint,
            graft,
            sample_input(layer) if x is None else x,
            config=config,
            streams_before=streams,
            thorough=thorough,
        )
    if not certificate.passed:
        raise CertificateError(layer=layer.name, certificate=certificate)
    return certificate


def _living(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """graft -> (layer, slug) of every graft in the model."""
    return {
        graft: (layer, slug)
        for layer, _, slot in slots(model)
        for slug, graft in slot.grafts().items()
    }


def _slot_at(model: nn.Module, layer: str) -> Slot | None:
    return slot_of(find_host(model, layer))


def _graft_at(model: nn.Module, layer: str, slug: str) -> Graft | None:
    slot = _slot_at(model, layer)
    return None if slot is None else slot.grafts().get(slug)


def _withdraw(model: nn.Module, layer: str, slug: str, *, had_slot: bool) -> None:
    """The way back of an insertion that failed half-way."""
    _take_out(model, layer, slug)
    if not had_slot:
        remove_slots(model, [layer])


def _take_out(model: nn.Module, layer: str, slug: str) -> None:
    slot = _slot_at(model, layer)
    if slot is not None and slug in slot.grafts():
        slot.take_out(slug)
