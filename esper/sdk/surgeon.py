"""Grafts of one run: put in, taken out, remembered. Runs in the training thread only."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from esper import blueprints, grafting
from esper.blueprints import Blueprint, Graft
from esper.contracts import (
    AdaptationState,
    Finding,
    LayerInfo,
    Reward,
    SafetyPolicy,
    Verdict,
)
from esper.exceptions import ConfigurationError, UndoError
from esper.grafting import (
    Receipt,
    RemedyReceipt,
    Replicas,
    SnapshotMemory,
    Surroundings,
    UndoReceipt,
    remedies,
)
from esper.grafting.receipts import undoing_everywhere
from esper.grafting.replicas import Joint, jointly
from esper.grafting.slot import SLOT_NAME, find_host, slot_of
from esper.grafting.snapshot import Snapshot
from esper.sdk.export.plain_checkpoints import layout_of, plain_optimizer_state
from esper.sdk.saving import losses_from_state, losses_to_state

logger = logging.getLogger("esper")

SNAPSHOTS_KEPT = 3
_GRAFT_MARK = f".{SLOT_NAME}."


@dataclass(slots=True, eq=False)
class Adaptation:
    """The life of one graft in this process.

    Attributes:
        uid: the server's id, or ``local-<n>``.
        state: ``probation``, ``kept``, ``rolled_back`` or ``reverted``.
        grafted_at: seconds since the epoch.
        guarded_until: the last step at which the trainer's own guard may take it out.
        loss_before: (step, loss) of the run before the graft, for the verdict.
        merged: the graft was folded into its host's weights; it is in effect, in no slot.
    """

    uid: str
    layer: str
    blueprint: str
    step: int
    state: AdaptationState
    config: dict[str, Any] = field(default_factory=dict)
    receipt: Receipt | None = None
    ablation_gain: float = math.nan
    guarded_until: int = -1
    grafted_at: float = 0.0
    verdict: Verdict | None = None
    reward: Reward | None = None
    loss_before: tuple[tuple[int, float], ...] = ()
    merged: bool = False

    @property
    def grafted(self) -> bool:
        """Its graft is in the model."""
        return self.state in (AdaptationState.PROBATION, AdaptationState.KEPT)

    @property
    def in_effect(self) -> bool:
        """What it was grafted for still acts: in its slot, or in the host's weights."""
        return self.merged or (self.receipt is not None and self.receipt.present)

    @property
    def restorable(self) -> bool:
        """The model as it was before the graft can be brought back."""
        return self.receipt is not None and self.receipt.can_undo_hard

    @property
    def local(self) -> bool:
        return self.uid.startswith("local-")


@dataclass(frozen=True, slots=True)
class Operation:
    """What is to be grafted; ``graft`` and ``memory`` may have been made in another thread."""

    layer: LayerInfo
    blueprint: Blueprint
    config: dict[str, Any]
    seed: int
    uid: str
    graft: Graft | None = None
    memory: SnapshotMemory | None = None


class Surgeon:
    """Applies and undoes grafts of one model, and knows which are in.

    Args:
        optimizers, schedulers, scaler, copies: what has to follow when parameters come and go.
        replicas: the other ranks of the model; what is done here is done on all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any] = (),
        scaler: Any = None,
        copies: Sequence[Any] = (),
        replicas: Replicas | None = None,
    ) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self._surroundings = Surroundings(
            self.optimizers, tuple(schedulers), scaler, tuple(copies), replicas
        )
        self.adaptations: list[Adaptation] = []
        self.remedies: list[RemedyReceipt] = []
        self._history: list[Adaptation | RemedyReceipt] = []  # as they came
        self._layout = layout_of(self.optimizers)

    @property
    def on_probation(self) -> bool:
        """Some graft may still be taken out again."""
        return any(entry.state is AdaptationState.PROBATION for entry in self.adaptations)

    @property
    def grafted(self) -> tuple[Adaptation, ...]:
        """Those whose graft is in the model, oldest first."""
        return tuple(entry for entry in self.adaptations if entry.grafted)

    def find(self, uid: str) -> Adaptation | None:
        return next((entry for entry in self.grafted if entry.uid == uid), None)

    def by_receipt(self, receipt: Receipt) -> Adaptation | None:
        return next((entry for entry in self.grafted if entry.receipt is receipt), None)

    def next_uid(self) -> str:
        taken = {entry.uid for entry in self.adaptations}
        return next(uid for n in itertools.count(1) if (uid := f"local-{n}") not in taken)

    def apply(self, operation: Operation, *, step: int) -> Adaptation:
        """Graft, certified; on any error the model is as before.

        Raises:
            IncompatibleLayerError, CertificateError, UnknownLayerError, ConfigurationError
        """
        receipt = grafting.apply_graft(
            self.model,
            operation.layer,
            operation.blueprint,
            config=operation.config,
            surroundings=self._surroundings,
            graft=operation.graft,
            seed=operation.seed,
            adaptation=operation.uid,
            step=step,
            memory=operation.memory,
        )
        adaptation = Adaptation(
            uid=operation.uid,
            layer=operation.layer.name,
            blueprint=operation.blueprint.slug,
            step=step,
            state=AdaptationState.PROBATION,
            config=dict(receipt.config),
            receipt=receipt,
            grafted_at=time.time(),
        )
        self.adaptations.append(adaptation)
        self._history.append(adaptation)
        self._forget_old_snapshots()
        return adaptation

    def reserve_memory(self) -> SnapshotMemory:
        """For the snapshot of the next graft; may run in another thread."""
        return SnapshotMemory.reserve(self.model, self.optimizers)

    def _forget_old_snapshots(self) -> None:
        """A snapshot is a copy of the model and its optimizer: only the newest few are kept."""
        living = [e.receipt if isinstance(e, Adaptation) else e for e in self._history]
        restorable = [receipt for receipt in living if receipt and receipt.can_undo_hard]
        for receipt in restorable[:-SNAPSHOTS_KEPT]:
            receipt.forget_snapshot()

    def undo(
        self, adaptation: Adaptation, *, hard: bool, state: AdaptationState
    ) -> tuple[UndoReceipt, tuple[Adaptation, ...]]:
        """Take a graft out.

        Returns:
            What was done, and every adaptation that went with it: a hard undo restores the whole
            model, so later grafts go too.

        Raises:
            UndoError: it could not be taken out.
        """
        receipt = adaptation.receipt
        if receipt is None:
            raise UndoError("this graft is not in the model any more", layer=adaptation.layer)
        report = receipt.undo(hard=hard)
        if hard:
            self._forget_since(adaptation)
        gone = tuple(entry for entry in self.grafted if not entry.in_effect)
        for entry in gone:
            entry.state = state
        return report, gone

    def _forget_since(self, adaptation: Adaptation) -> None:
        """Whatever was done since that graft is undone with it."""
        place = self._history.index(adaptation)
        undone, self._history = self._history[place:], self._history[:place]
        for entry in undone:
            if isinstance(entry, RemedyReceipt):
                self._drop_remedy(entry)
            else:
                entry.merged = False  # into weights that are again as they were before it

    # -- remedies ------------------------------------------------------------------------------

    @property
    def surroundings(self) -> Surroundings:
        """What a remedy has to know beside the model."""
        return replace(self._surroundings, copies=())  # a remedy leaves the averages alone

    def remedy(
        self, apply: Callable[[], RemedyReceipt], merged: Adaptation | None = None
    ) -> RemedyReceipt:
        """On all ranks or on none; ``merged`` is the adaptation that it folds into its host.

        Raises:
            ReplicaError: another rank could not do it, or it came to other weights.
            Whatever ``apply`` raises; the model is as before.
        """
        with jointly(self._surroundings.replicas) as joint:
            receipt = apply()
            try:
                joint.commit()
            except BaseException:
                if not joint.done:
                    receipt.undo()
                raise
        self.remedies.append(receipt)
        self._history.append(receipt)
        if merged is not None:
            merged.merged = True
        self._forget_old_snapshots()
        return receipt

    def place_of(self, receipt: RemedyReceipt) -> int:
        """Where it stands in what was done so far, -1 for none: the same on all ranks."""
        return self._history.index(receipt) if receipt in self._history else -1

    def undo_remedy(self, receipt: RemedyReceipt) -> UndoReceipt:
        """Brings back the state before it; remedies that came later go with it.

        Raises:
            UndoError: it could not be undone.
        """
        if receipt not in self.remedies:
            raise UndoError("this remedy is not in effect any more", layer=receipt.layer)
        if self._surroundings.replicas is None:
            report = receipt.undo()
        else:
            with undoing_everywhere(self.model, self.surroundings, receipt):
                report = receipt.undo()
        place = self._history.index(receipt)
        undone, self._history = self._history[place:], self._history[:place]
        for entry in undone:
            if isinstance(entry, RemedyReceipt):
                self._drop_remedy(entry)
        return report

    def _drop_remedy(self, receipt: RemedyReceipt) -> None:
        self.remedies.remove(receipt)
        for entry in self.adaptations:
            if entry.merged and entry.receipt is not None and not entry.receipt.graft.merged:
                entry.merged = False

    @contextmanager
    def without(self, adaptation: Adaptation) -> Iterator[None]:
        """Inside it, the graft is not in the model's forward pass."""
        slot = slot_of(find_host(self.model, adaptation.layer))
        assert slot is not None
        with slot.without(adaptation.blueprint):
            yield

    def on_step(self) -> None:
        """An optimizer step is over: grafts that follow a schedule move on."""
        for entry in self.grafted:
            if entry.receipt is not None:
                entry.receipt.graft.on_step()

    def youngest_on_probation(self, step: int) -> Adaptation | None:
        """The graft that the guard may take out at this step."""
        return next((entry for entry in reversed(self.grafted) if _is_guarded(entry, step)), None)

    def due_for_ablation(self, step: int, policy: SafetyPolicy) -> list[Adaptation]:
        """Grafts that have just matured, or come to the end of their probation."""
        ages = (policy.maturity_steps, policy.probation_steps)
        return [
            entry
            for entry in self.grafted
            if entry.state is AdaptationState.PROBATION
            and step - entry.step in ages
            # A capacity limit or a balancer is not there for the loss: ablation would damn it.
            and not blueprints.get_blueprint(entry.blueprint).requires
        ]

    def on_settled(self, uid: str, state: str) -> None:
        """The server's word on a graft that came out of a checkpoint."""
        entry = self.find(uid)
        if entry is not None and state == AdaptationState.KEPT:
            entry.state = AdaptationState.KEPT

    def audit(self) -> list[Finding]:
        books = grafting.audit(self.model, self.optimizers)
        return [*books, *grafting.audit_copies(self.model)]

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Structure first, then weights of the grafts, optimizer state by name, applied set."""
        return {
            "structure": grafting.structure(self.model),
            "grafts": {
                name: tensor.detach().clone()
                for name, tensor in self.model.state_dict().items()
                if _GRAFT_MARK in name
            },
            "optimizers": [
                _optimizer_state(self.model, optimizer) for optimizer in self.optimizers
            ],
            "applied": [_to_state(entry) for entry in self.grafted],
            "remedies": [
                {"remedy": r.remedy, "layer": r.layer, "details": r.details} for r in self.remedies
            ],
        }

    def plain_optimizer_states(self) -> list[dict[str, Any]]:
        """Each optimizer's state dict as it would be had nothing been grafted."""
        pairs = zip(self.optimizers, self._layout, strict=True)
        return [plain_optimizer_state(optimizer, groups) for optimizer, groups in pairs]

    def load_state_dict(self, state: dict[str, Any], joint: Joint) -> None:
        """Rebuild what :meth:`state_dict` described, in a model that has no grafts yet.

        All of it or nothing: on any error model, optimizers and schedulers are as before.

        Args:
            joint: what the caller does on all ranks, or on none; committed here.

        Raises:
            ConfigurationError: the model has grafts already, or another optimizer list.
            Any other error that a state can cause which is not of this model.
        """
        if self.grafted:
            raise ConfigurationError("this model carries grafts already; load into a fresh one")
        if len(state["optimizers"]) != len(self.optimizers):
            raise ConfigurationError("the state is of another number of optimizers")
        slotted = {name for name, _, _ in grafting.slots(self.model)}
        snapshot = Snapshot.take(self.model, self.surroundings)
        receipts: tuple[Receipt, ...] = ()
        try:
            receipts = grafting.rebuild(self.model, state["structure"], self._surroundings)
            for entry in state["remedies"]:
                self._repeat(entry["remedy"], entry["layer"], entry["details"])
            _load_grafts(self.model, state["grafts"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                if saved is not None:
                    grafting.load_optimizer_state_by_name(
                        self.model, optimizer, saved, self._surroundings.schedulers
                    )
            places = {(receipt.layer, receipt.blueprint): receipt for receipt in receipts}
            adaptations = [
                _from_state(
                    entry,
                    None if entry["merged"] else places[entry["layer"], entry["blueprint"]],
                )
                for entry in state["applied"]
            ]
            grafting.let_follow(self.model, self._surroundings.copies)
            joint.commit()
        except BaseException:
            if not joint.done:
                grafting.take_back(self.model, receipts, slotted)
                snapshot.restore()
                self.remedies.clear()
            raise
        self.adaptations, self._history = adaptations, list(adaptations)

    def _repeat(self, remedy: str, layer: str, details: dict[str, Any]) -> None:
        """What a remedy did to the optimizer's books; what it did to weights is in the weights."""
        around = self.surroundings
        if remedy == "set_lr":
            receipt = remedies.set_layer_lr(
                self.model, layer, details["factor"], surroundings=around
            )
        elif remedy in ("freeze", "unfreeze"):
            act = remedies.freeze if remedy == "freeze" else remedies.unfreeze
            receipt = act(self.model, layer, surroundings=around)
        else:
            return
        receipt.forget_snapshot()
        self.remedies.append(receipt)


def _is_guarded(entry: Adaptation, step: int) -> bool:
    return entry.state is AdaptationState.PROBATION and step <= entry.guarded_until


def _load_grafts(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    mine = {name: t for name, t in model.state_dict().items() if _GRAFT_MARK in name}
    if mine.keys() != saved.keys():
        odd = ", ".join(sorted(mine.keys() ^ saved.keys())[:5])
        raise ConfigurationError(f"the saved grafts do not fit this model: {odd}")
    for name, tensor in mine.items():
        if saved[name].shape != tensor.shape:  # copy_ would spread a single number over it
            raise ConfigurationError(
                f"the saved {name} has shape {tuple(saved[name].shape)}, here {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(saved[name])


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """By name; None for an optimizer that also trains something beside this model."""
    try:
        return grafting.optimizer_state_by_name(model, optimizer)
    except ConfigurationError:
        return None


def _to_state(entry: Adaptation) -> dict[str, Any]:
    return {
        "adaptation": entry.uid,
        "layer": entry.layer,
        "blueprint": entry.blueprint,
        "config": entry.config,
        "step": entry.step,
        "state": str(entry.state),
        "guarded_until": entry.guarded_until,
        "ablation_gain": entry.ablation_gain,
        # Not the moment: the time between two processes is no part of a probation.
        "age_seconds": time.time() - entry.grafted_at,
        "loss_before": losses_to_state(entry.loss_before),
        "merged": entry.merged,
    }


def _from_state(saved: dict[str, Any], receipt: Receipt | None) -> Adaptation:
    return Adaptation(
        uid=str(saved["adaptation"]),
        layer=str(saved["layer"]),
        blueprint=str(saved["blueprint"]),
        config=dict(saved["config"]),
        step=int(saved["step"]),
        state=AdaptationState(saved["state"]),
        guarded_until=int(saved["guarded_until"]),
        ablation_gain=float(saved["ablation_gain"]),
        receipt=receipt,
        grafted_at=time.time() - float(saved["age_seconds"]),
        loss_before=tuple(losses_from_state(saved["loss_before"])),
        merged=bool(saved["merged"]),
    )
