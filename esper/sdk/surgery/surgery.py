"""Puts grafts into one model, and holds what takes them out, remedies it and loads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from esper import blueprints, grafting
from esper.contracts import AdaptationState, LayerInfo, RunMode
from esper.exceptions import IncompatibleLayerError
from esper.grafting import (
    Receipt,
    RemedyReceipt,
    SnapshotMemory,
    Surroundings,
    UndoReceipt,
)
from esper.grafting.companions.companion import with_companions
from esper.grafting.found_copies.search import Copies
from esper.grafting.ranks.replicas import Call
from esper.grafting.slot import find_host, slot_of
from esper.grafting.snapshots.snapshot import bytes_of_state
from esper.health import HealthSampler
from esper.health.sharded import ShardedSampler
from esper.remedies import GoodStates, Stop
from esper.remedies.state_folder import StateFolder
from esper.sdk.adaptation import Adaptation, Operation
from esper.sdk.changes import Changes
from esper.sdk.findings import Findings, LedgerWatch
from esper.sdk.layers import Layers
from esper.sdk.ranks import Order, Ranks
from esper.sdk.reporting import SurgeryReports
from esper.sdk.run_state import RunState
from esper.sdk.script_copies import ScriptCopies
from esper.sdk.surgery.after_change import AfterChange
from esper.sdk.surgery.idle_slots import IdleSlots
from esper.sdk.surgery.loads import Loads
from esper.sdk.surgery.remedies import Remedies
from esper.sdk.surgery.removals import Removals
from esper.sdk.surgery.subject import Subject


class Surgery:
    """Changes one model, for the server, the guard, local mode and the user's script.

    Args:
        surroundings: optimizers, schedulers and copies, which must follow each change.
        snapshot_limit: bytes of memory that the snapshots may take together.
        snapshot_folder: where those go that do not fit; None: they are freed.
        state_folder: where good states are kept on disk too.
        checkpoint: the script's own function that saves the run; None: there is none.

    Attributes:
        changes: what is in the model.
        script_copies: what the script keeps of the model by itself.
        states: earlier good states to rewind to; None in a run that only observes.
        stop: whether the loop is asked to stop.
    """

    def __init__(
        self,
        model: nn.Module,
        surroundings: Surroundings,
        run: RunState,
        *,
        layers: Layers,
        ranks: Ranks,
        ledger: LedgerWatch,
        reports: SurgeryReports,
        findings: Findings,
        snapshot_limit: int,
        snapshot_folder: Path | None = None,
        state_folder: Path | None = None,
        checkpoint: Callable[[], object] | None = None,
    ) -> None:
        self.model = model
        self.copies = Copies(model, surroundings.copies)
        surroundings = replace(surroundings, copies=self.copies)
        self.script_copies = ScriptCopies(
            model, self.copies, surroundings, layers=layers, ledger=ledger, findings=findings
        )
        self.changes = Changes(snapshot_limit, snapshot_folder)
        self.subject = Subject(
            model=model,
            surroundings=surroundings,
            run=run,
            ranks=ranks,
            changes=self.changes,
            reports=reports,
            findings=findings,
        )
        self._layers = layers
        self._run = run
        self._ranks = ranks
        rewinds = run.mode is not RunMode.OBSERVE and not surroundings.why_no_remedy()
        self.states = self._good_states(state_folder) if rewinds else None
        self.stop = Stop()
        self._after = AfterChange(self.subject, ledger, snapshot_limit)
        self.idle_slots = IdleSlots(self.subject)
        self.loads = Loads(self.subject, self._after, self.idle_slots, self.stop)
        self.removals = Removals(self.subject, self._after, self.idle_slots)
        self.remedies = Remedies(
            self.subject, self._after, states=self.states, stop=self.stop, checkpoint=checkpoint
        )

    def _good_states(self, folder: Path | None) -> GoodStates:
        optimizers = self.subject.surroundings.optimizers
        on_disk = StateFolder(folder, writes=self._ranks.decides) if folder is not None else None
        states = GoodStates(
            self.model,
            lambda: with_companions(optimizers),
            # What a copy takes differs from rank to rank, and all must keep the same steps.
            clock=time.thread_time if self._ranks.alone else lambda: 0.0,
            folder=on_disk,
        )
        states.keep_start()
        return states

    @property
    def step(self) -> int:
        """Of the run, now."""
        return self._run.step

    @property
    def sampler(self) -> HealthSampler | ShardedSampler | None:
        """Measures the model's health; None before the first complete step."""
        return self._after.sampler

    @sampler.setter
    def sampler(self, sampler: HealthSampler | ShardedSampler | None) -> None:
        self._after.sampler = sampler

    # -- grafts --------------------------------------------------------------------------------

    def layer(self, name: str, since: str = "", blueprint: str = "") -> LayerInfo:
        """A layer, or the place of a graft that reads the input of an earlier one.

        Raises:
            UnknownLayerError, IncompatibleLayerError
        """
        if not since:
            return self._layers.find(name)
        layers = {layer.name: layer for layer in self._layers.all}
        return grafting.span_of(layers, since, name, blueprint)

    def reserve_memory(self) -> SnapshotMemory:
        """For the snapshot of the next graft; may run in another thread."""
        return SnapshotMemory.reserve(self.model, self.subject.surroundings.optimizers)

    def apply(self, operation: Operation, *, by_script: bool = False) -> Adaptation:
        """Graft, certified; on any error the model is as before.

        Args:
            by_script: the script asks for it by itself, so it knows what it keeps by hand.

        Raises:
            IncompatibleLayerError, CertificateError, UnknownLayerError, ConfigurationError,
            ReplicaError
        """
        self.settle_snapshots(wait=True)
        self._refuse_without_snapshot(operation)
        self._ranks.order(Order.graft(operation))
        try:
            self.script_copies.prepare(operation, by_script=by_script)
        except Exception as error:
            self._ranks.refuse(error)
            raise
        adaptation = self._record(operation, self._put_in(operation))
        self.changes.add_graft(adaptation)
        self._after.say_what_can_be_undone()
        self.loads.follow(adaptation)
        self._after.follow_up()
        self.subject.reports.grafted(adaptation)
        return adaptation

    def _refuse_without_snapshot(self, operation: Operation) -> None:
        """A run with a folder for snapshots wants hard undos. Several ranks find it out together,
        after the graft, and a finding says so."""
        if not self._ranks.alone:
            return
        nbytes = bytes_of_state(self.model, self.subject.surroundings.optimizers)
        reason = self.changes.why_no_snapshot(nbytes)
        if reason:
            raise IncompatibleLayerError(
                layer=operation.layer.name, blueprint=operation.blueprint.slug, reason=reason
            )

    def _put_in(self, operation: Operation) -> Receipt:
        return grafting.apply_graft(
            self.model,
            operation.layer,
            operation.blueprint,
            config=operation.config,
            surroundings=self.subject.surroundings,
            graft=operation.graft,
            seed=operation.seed,
            adaptation=operation.uid,
            step=self._run.step,
            memory=operation.memory,
        )

    def _record(self, operation: Operation, receipt: Receipt) -> Adaptation:
        run = self._run
        return Adaptation(
            uid=operation.uid,
            layer=operation.layer.name,
            since=operation.layer.since,
            blueprint=operation.blueprint.slug,
            step=run.step,
            state=AdaptationState.PROBATION,
            config=dict(receipt.config),
            receipt=receipt,
            grafted_at=time.time(),
            guarded_until=run.step + run.policy.probation_steps,
            loss_before=tuple(run.losses_of_its_weights()),
        )

    def keep(self, adaptation: Adaptation, reason: str = "") -> None:
        """Its probation is passed."""
        adaptation.state = AdaptationState.KEPT
        self.subject.reports.kept(adaptation, reason)

    def planned(self, layer: str, blueprint: str, since: str, config: dict[str, Any]) -> Operation:
        """A graft that a script asks for; nothing is done."""
        entry = blueprints.get_blueprint(blueprint)
        return Operation(
            layer=self.layer(layer, since, entry.slug),
            blueprint=entry,
            config=config,
            seed=self._run.step + 1,
            uid=self.changes.next_uid(),
        )

    def graft(self, operation: Operation) -> Receipt:
        """A script grafts; see :meth:`Session.graft`."""
        layer, blueprint = operation.layer, operation.blueprint.slug
        self.subject.meet(Call.GRAFT, layer.name, blueprint, layer.since, operation.config)
        receipt = self.apply(operation, by_script=True).receipt
        assert receipt is not None
        return receipt

    def config_of(
        self,
        layer: str,
        blueprint: str,
        since: str,
        config: dict[str, Any],
        factors: dict[str, float],
    ) -> dict[str, Any]:
        """``config``, or that of a variant at this layer where there are factors.

        Raises:
            UnknownLayerError, UnknownBlueprintError, IncompatibleLayerError: of the place.
            ConfigurationError: the blueprint has no such variant here.
        """
        if not factors:
            return config
        entry = blueprints.get_blueprint(blueprint)
        return entry.varied(self.layer(layer, since, entry.slug), factors)

    def graft_copy(
        self,
        layer: str,
        blueprint: str,
        since: str,
        config: dict[str, Any],
        model: nn.Module,
        optimizer: Any,
    ) -> Receipt:
        """The same graft in a copy of the model, of which the run knows nothing."""
        entry = blueprints.get_blueprint(blueprint)
        return grafting.apply_graft(
            model,
            self.layer(layer, since, entry.slug),
            entry,
            config=config,
            surroundings=Surroundings((optimizer,)),
        )

    # -- grafts and remedies that are in the model ---------------------------------------------

    def undo(self, receipt: Receipt | RemedyReceipt, *, hard: bool) -> UndoReceipt:
        """A script undoes; see :meth:`Session.undo`."""
        if isinstance(receipt, RemedyReceipt):
            return self.remedies.undo(receipt, hard=hard)
        return self.removals.undo(receipt, hard=hard)

    @contextmanager
    def without(self, adaptation: Adaptation) -> Iterator[None]:
        """Inside it, the graft is not in the model's forward pass."""
        slot = slot_of(find_host(self.model, adaptation.layer))
        assert slot is not None
        with slot.without(adaptation.blueprint):
            yield

    def on_step(self) -> None:
        """An optimizer step is over: grafts that follow a schedule move on."""
        self.idle_slots.on_step()
        self.settle_snapshots()
        if self.changes.grafted:
            self.removals.notice_gone()
        for entry in self.changes.grafted:
            if entry.receipt is not None:
                entry.layer = entry.receipt.layer
                entry.receipt.graft.on_step()
                # Compiled code does not attach hooks to the host.
                entry.receipt.graft.attach(find_host(self.model, entry.layer))

    def settle_snapshots(self, *, wait: bool = False) -> None:
        """As :meth:`AfterChange.settle_snapshots`."""
        self._after.settle_snapshots(wait=wait)

    def settle(self, uid: str, state: str) -> None:
        """The server's last state of a graft that came out of a checkpoint."""
        entry = self.changes.find(uid)
        if entry is not None and state == AdaptationState.KEPT:
            entry.state = AdaptationState.KEPT
