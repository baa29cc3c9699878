"""Grafts of one run: put in, taken out, remembered. Runs in the training thread only."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from esper import grafting
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
from esper.grafting import Receipt, Replicas, SnapshotMemory, UndoReceipt
from esper.grafting.slot import SLOT_NAME, find_host, slot_of

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

    @property
    def grafted(self) -> bool:
        """Its graft is in the model."""
        return self.state in (AdaptationState.PROBATION, AdaptationState.KEPT)

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
        optimizers, schedulers, scaler: what has to follow when parameters come and go.
        replicas: the other ranks of the model; what is done here is done on all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any] = (),
        scaler: Any = None,
        replicas: Replicas | None = None,
    ) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self._schedulers = tuple(schedulers)
        self._scaler = scaler
        self._replicas = replicas
        self.adaptations: list[Adaptation] = []

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
            optimizers=self.optimizers,
            schedulers=self._schedulers,
            scaler=self._scaler,
            graft=operation.graft,
            seed=operation.seed,
            adaptation=operation.uid,
            step=step,
            memory=operation.memory,
            replicas=self._replicas,
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
        self._forget_old_snapshots()
        return adaptation

    def reserve_memory(self) -> SnapshotMemory:
        """For the snapshot of the next graft; may run in another thread."""
        return SnapshotMemory.reserve(self.model, self.optimizers)

    def _forget_old_snapshots(self) -> None:
        """A snapshot is a copy of the model and its optimizer: only the newest few are kept."""
        restorable = [r for e in self.grafted if (r := e.receipt) is not None and r.can_undo_hard]
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
        gone = tuple(e for e in self.grafted if e.receipt is None or not e.receipt.present)
        for entry in gone:
            entry.state = state
        return report, gone

    @contextmanager
    def without(self, adaptation: Adaptation) -> Iterator[None]:
        """Inside it, the graft is not in the model's forward pass."""
        slot = slot_of(find_host(self.model, adaptation.layer))
        assert slot is not None
        grafts = dict(slot._modules)
        slot._modules.pop(adaptation.blueprint)
        try:
            yield
        finally:
            slot._modules.clear()
            slot._modules.update(grafts)

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
            if entry.state is AdaptationState.PROBATION and step - entry.step in ages
        ]

    def on_settled(self, uid: str, state: str) -> None:
        """The server's word on a graft that came out of a checkpoint."""
        entry = self.find(uid)
        if entry is not None and state == AdaptationState.KEPT:
            entry.state = AdaptationState.KEPT

    def audit(self) -> list[Finding]:
        return list(grafting.audit(self.model, self.optimizers))

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild what :meth:`state_dict` described, in a model that has no grafts yet.

        Raises:
            ConfigurationError: the model has grafts already, or another optimizer list.
        """
        if self.grafted:
            raise ConfigurationError("this model carries grafts already; load into a fresh one")
        if len(state["optimizers"]) != len(self.optimizers):
            raise ConfigurationError("the state is of another number of optimizers")
        receipts = grafting.rebuild(
            self.model,
            state["structure"],
            self.optimizers,
            schedulers=self._schedulers,
            replicas=self._replicas,
        )
        _load_grafts(self.model, state["grafts"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if saved is not None:
                grafting.load_optimizer_state_by_name(self.model, optimizer, saved)
        places = {(receipt.layer, receipt.blueprint): receipt for receipt in receipts}
        self.adaptations = [
            _from_state(entry, places[entry["layer"], entry["blueprint"]])
            for entry in state["applied"]
        ]


def _is_guarded(entry: Adaptation, step: int) -> bool:
    return entry.state is AdaptationState.PROBATION and step <= entry.guarded_until


def _load_grafts(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    mine = {name: t for name, t in model.state_dict().items() if _GRAFT_MARK in name}
    if mine.keys() != saved.keys():
        odd = ", ".join(sorted(mine.keys() ^ saved.keys())[:5])
        raise ConfigurationError(f"the saved grafts do not fit this model: {odd}")
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
    }


def _from_state(saved: dict[str, Any], receipt: Receipt) -> Adaptation:
    return Adaptation(
        uid=saved["adaptation"],
        layer=saved["layer"],
        blueprint=saved["blueprint"],
        config=saved["config"],
        step=saved["step"],
        state=AdaptationState(saved["state"]),
        guarded_until=saved["guarded_until"],
        receipt=receipt,
        grafted_at=time.time(),
    )
