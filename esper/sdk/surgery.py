"""Everything that a process can do to its model while it trains, and what must follow a change.

order      rank 0 tells the other ranks; a script calls on each rank, so the ranks meet
change     the model, its optimizer, schedulers and copies; on all ranks, or on none
follow-up  health sampler, ledger audit and movement watch look at the changed model
report     the server gets what it did not order itself

Runs in the training thread, between two steps.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from esper import blueprints, grafting
from esper.contracts import (
    AdaptationState,
    LayerInfo,
    RemedyKind,
    RunMode,
)
from esper.exceptions import ConfigurationError, GraftError, IncompatibleLayerError, UndoError
from esper.grafting import (
    GuardVerdict,
    Receipt,
    RemedyReceipt,
    SnapshotMemory,
    Surroundings,
    UndoReceipt,
    remedies,
)
from esper.grafting.companions.companion import with_companions
from esper.grafting.compiled import anything_was_compiled
from esper.grafting.found_copies.search import Copies
from esper.grafting.ranks.replicas import Call, Joint, jointly
from esper.grafting.slot import find_host, slot_of
from esper.grafting.snapshots.snapshot import bytes_of_state
from esper.grafting.state_dicts import Difference
from esper.grafting.tensors.digests import Frozen
from esper.health import HealthSampler
from esper.health.sharded import ShardedSampler
from esper.remedies import (
    Batch,
    GoodStates,
    Remedy,
    Stop,
    Target,
    apply_remedy,
    get_remedy,
    refusal,
)
from esper.remedies.state_folder import StateFolder
from esper.sdk import checkpoint, framework_loads
from esper.sdk.adaptation import Adaptation, Operation
from esper.sdk.changes import Changes
from esper.sdk.findings import (
    Findings,
    LedgerWatch,
    came_back,
    fewer_snapshots,
    left_by_load,
    undone_in_part,
)
from esper.sdk.layers import Layers
from esper.sdk.ranks import Order, Ranks
from esper.sdk.reporting import SurgeryReports
from esper.sdk.run_state import RunState
from esper.sdk.script_copies import ScriptCopies

# What an undo did, and every adaptation that is out of the model because of it.
TakenOut = tuple[UndoReceipt, tuple[Adaptation, ...]]


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
        sampler: measures the model's health; None before the first complete step.
        states: earlier good states to rewind to; None in a run that only observes.
        stop: whether the loop is asked to stop.
        evaluate: measures the held-out loss on all ranks; None: the script cannot.
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
        self._snapshot_limit = snapshot_limit
        self._told_of_limit = False
        self.sampler: HealthSampler | ShardedSampler | None = None
        # Compiled code runs no slot that comes later, so there they are prepared at attach.
        self._keeps_slots = run.mode is not RunMode.OBSERVE
        self._idle_slots = False  # left by a load, inside which torch's hooks cannot be removed
        self._surroundings = surroundings
        self._without_copies = replace(surroundings, copies=())  # a remedy leaves averages alone
        self._run = run
        self._layers = layers
        self._ranks = ranks
        self._ledger = ledger
        self._reports = reports
        self._findings = findings
        rewinds = run.mode is not RunMode.OBSERVE and not surroundings.why_no_remedy()
        self.states = self._good_states(state_folder) if rewinds else None
        self.stop = Stop()
        self._checkpoint = checkpoint
        self.evaluate: Callable[[], float] | None = None

    def _good_states(self, folder: Path | None) -> GoodStates:
        optimizers = self._surroundings.optimizers
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
        return SnapshotMemory.reserve(self.model, self._surroundings.optimizers)

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
        run = self._run
        try:
            self.script_copies.prepare(operation, by_script=by_script)
        except Exception as error:
            self._ranks.refuse(error)
            raise
        receipt = grafting.apply_graft(
            self.model,
            operation.layer,
            operation.blueprint,
            config=operation.config,
            surroundings=self._surroundings,
            graft=operation.graft,
            seed=operation.seed,
            adaptation=operation.uid,
            step=run.step,
            memory=operation.memory,
        )
        adaptation = Adaptation(
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
        self.changes.add_graft(adaptation)
        self._say_what_can_be_undone()
        self._follow_loads(adaptation)
        self._follow_up()
        self._reports.grafted(adaptation)
        return adaptation

    def _refuse_without_snapshot(self, operation: Operation) -> None:
        """A run with a folder for snapshots wants hard undos. Several ranks find it out together,
        after the graft, and a finding says so."""
        if not self._ranks.alone:
            return
        nbytes = bytes_of_state(self.model, self._surroundings.optimizers)
        reason = self.changes.why_no_snapshot(nbytes)
        if reason:
            raise IncompatibleLayerError(
                layer=operation.layer.name, blueprint=operation.blueprint.slug, reason=reason
            )

    def keep(self, adaptation: Adaptation, reason: str = "") -> None:
        """Its probation is passed."""
        adaptation.state = AdaptationState.KEPT
        self._reports.kept(adaptation, reason)

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
        layer = operation.layer
        self._meet(Call.GRAFT, layer.name, operation.blueprint.slug, layer.since, operation.config)
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

    # -- taking grafts out ---------------------------------------------------------------------

    def take_out(self, adaptation: Adaptation, *, hard: bool, state: AdaptationState) -> TakenOut:
        """Undo one graft. A hard undo restores the whole model, so later grafts go too.

        Args:
            state: of every adaptation that is out of the model afterwards.

        Raises:
            UndoError: it could not be taken out.
            ReplicaError: another rank could not take it out.
        """
        self._ranks.order(Order.undo(adaptation.uid, hard=hard, state=state))
        receipt, before = adaptation.receipt, tuple(self.changes.remedies)
        if receipt is None:
            raise UndoError("this graft is not in the model any more", layer=adaptation.layer)
        report = receipt.undo(hard=hard)
        if hard:
            self.changes.drop_since(adaptation)
            self._run.go_back(adaptation.step)
        else:
            self._run.give_up(adaptation.step)  # the losses since were those of a larger model
        gone = self.changes.mark_gone(state)
        self.remove_idle_slots()
        self._follow_up(restored=True)
        self._say_what_was_kept(adaptation.blueprint, adaptation.layer, report)
        self._report_undone(before, report)
        return report, gone

    def settle_slots(self) -> None:
        """The first step is over, so it is known whether torch.compile has compiled anything.

        If not, a graft gets its slot when it comes: an empty one costs some microseconds at each
        call of its layer.
        """
        if self._ranks.alone and not anything_was_compiled():
            self._keeps_slots = False
            self.remove_idle_slots()

    def remove_idle_slots(self) -> None:
        """Where slots are not kept, a layer has one only while it holds grafts."""
        self._idle_slots = False
        if not self._keeps_slots:
            for model in (self.model, *self.copies):
                grafting.remove_slots(model)

    def take_out_for_server(self, adaptation: Adaptation, *, hard: bool) -> TakenOut:
        """As the server ordered. It gets a report of other grafts that had to go with this one."""
        report, gone = self.take_out(adaptation, hard=hard, state=AdaptationState.ROLLED_BACK)
        others = [entry for entry in gone if entry is not adaptation]
        self._reports.removed(gone, report, "ordered by the server")
        self._reports.taken_out(others, report, self._run.step, RemedyKind.UNDO, meant=adaptation)
        return report, gone

    def take_out_for_guard(
        self, adaptation: Adaptation, verdict: GuardVerdict
    ) -> tuple[Adaptation, ...]:
        """At once; to the state before the graft, if its snapshot was kept."""
        report, gone = self.take_out(
            adaptation, hard=adaptation.restorable, state=AdaptationState.ROLLED_BACK
        )
        self._reports.rolled_back(gone, report, self._run.step, verdict)
        return gone

    def undo(self, receipt: Receipt | RemedyReceipt, *, hard: bool) -> UndoReceipt:
        """A script undoes; see :meth:`Session.undo`."""
        if isinstance(receipt, RemedyReceipt) and receipt.changed_nothing:
            return receipt.undo(hard)
        if isinstance(receipt, RemedyReceipt):
            return self._undo_remedy(receipt) if hard else self._end_remedy(receipt)
        if not hard and self.changes.left_by_load(receipt):  # what is wanted has happened
            return UndoReceipt(hard=False, exact=False, pause_ms=0.0, _after=Frozen.of(self.model))
        return self._take_out_for_script(receipt, RemedyKind.UNDO, hard=hard)

    def prune(self, receipt: Receipt) -> UndoReceipt:
        """A script removes a graft for good; see :meth:`Session.prune`."""
        return self._take_out_for_script(receipt, RemedyKind.PRUNE, hard=False)

    def _take_out_for_script(
        self, receipt: Receipt, remedy: RemedyKind, *, hard: bool
    ) -> UndoReceipt:
        if self._is_of_another_session(receipt):
            return self._take_out_of_another_session(receipt, remedy, hard=hard)
        adaptation = self.changes.of_receipt(receipt)
        self._meet(Call.UNDO, adaptation.uid, str(remedy), hard)
        report, gone = self.take_out(adaptation, hard=hard, state=AdaptationState.REVERTED)
        self._reports.removed(gone, report, "asked for by the script")
        self._reports.taken_out(gone, report, self._run.step, remedy, meant=adaptation)
        return report

    def _is_of_another_session(self, receipt: Receipt) -> bool:
        """It is in this model, by an earlier session or by ``esper.graft``."""
        here = receipt.is_of(self.model) and receipt.present
        return here and not self.changes.knows(receipt)

    def _take_out_of_another_session(
        self, receipt: Receipt, remedy: RemedyKind, *, hard: bool
    ) -> UndoReceipt:
        """No record of this session has it; what came later in this session goes with it."""
        before = tuple(self.changes.remedies)
        self._meet(Call.UNDO, receipt.layer, receipt.blueprint, str(remedy), hard)
        report = receipt.undo(hard=hard)
        if hard:
            self.changes.drop_younger(receipt)
        grafting.let_follow(self.model, self._surroundings.copies)
        self.notice_gone()
        self.remove_idle_slots()
        self._follow_up(restored=True)
        self._say_what_was_kept(receipt.blueprint, receipt.layer, report)
        self._report_undone(before, report)
        return report

    def notice_gone(self) -> None:
        """Grafts of this session that ``receipt.undo()`` or another session has taken out.

        Those whose layer has another name now go on under that name.
        """
        gone = self.changes.mark_gone(AdaptationState.REVERTED)
        if not gone:
            return
        for entry in gone:
            if entry.receipt is not None:
                entry.receipt.notice_gone()
        report = UndoReceipt(hard=False, exact=False, pause_ms=0.0)
        reason = "receipt.undo() was called, or another session took it out"
        # Whether the weights were restored is not known here, so nothing is said of them.
        self._reports.removed(gone, replace(report, hard=True), reason)
        self._reports.taken_out(gone, report, self._run.step, RemedyKind.UNDO, meant=gone[0])
        self._follow_up(restored=True)

    # -- remedies ------------------------------------------------------------------------------

    def remedy(
        self, slug: str, layer: str, sample: Any, config: dict[str, Any], finding: str = ""
    ) -> RemedyReceipt:
        """See :meth:`Session.remedy`; on several ranks the script calls it on each.

        Args:
            finding: slug of the rule whose finding it answers; empty: somebody asked for it.
        """
        found = get_remedy(slug)
        self._meet(Call.REMEDY, slug, layer, config)
        return self._of_catalogue(found, layer, sample, config, finding=finding)

    def remedy_for_server(
        self,
        adaptation: str,
        slug: str,
        layer: str,
        sample: Any,
        config: dict[str, Any],
        finding: str = "",
    ) -> RemedyReceipt:
        """As the server ordered; rank 0 tells the other ranks.

        Args:
            adaptation: its uid at the server.
            finding: as for :meth:`remedy`.

        Raises:
            The errors of :meth:`Session.remedy`.
        """
        found = get_remedy(slug)
        if found.needs_sample and not self._ranks.alone:
            raise GraftError(
                f"{slug} needs a batch of inputs, which must be the same on all ranks: call "
                "session.remedy(…, sample=…) on each of them",
                layer=layer,
            )
        self._ranks.order(Order.of_remedy(slug, layer, config, adaptation))
        return self._of_catalogue(found, layer, sample, config, adaptation, finding)

    def _of_catalogue(
        self,
        found: Remedy,
        layer: str,
        sample: Any,
        config: dict[str, Any],
        adaptation: str = "",
        finding: str = "",
    ) -> RemedyReceipt:
        def act(surroundings: Surroundings, step: int) -> RemedyReceipt:
            receipt = apply_remedy(found, self._target(layer, sample), config)
            receipt.adaptation = adaptation
            return receipt

        receipt = self._remedy(
            act,
            layer,
            changes_nothing=found.changes_nothing,
            catalogue=True,
            finding=finding,
        )
        if found.changes_weights:
            back_to = receipt.details.get("to_step", 0 if found.begins_anew else None)
            if back_to is not None:
                self._run.give_up(back_to)
        found.on_agreed(self._target(layer, None))
        if found.begins_anew and self.states is not None:
            self.states.begin_anew()
        return receipt

    def refusal(self, slug: str, layer: str, sample: Any, config: dict[str, Any]) -> str:
        """Why a remedy cannot be applied now, a sentence; empty: it can."""
        remedy = get_remedy(slug)
        return refusal(remedy, self._target(layer, sample), remedy.config_for(config))

    def _target(self, layer: str, sample: Any) -> Target:
        around, step = self._without_copies, self._run.step
        return Target(
            self.model,
            around,
            layer,
            step,
            Batch.of(sample),
            self.states,
            self.stop,
            self.evaluate,
            self._checkpoint,
        )

    def freeze(self, layer: str) -> RemedyReceipt:
        """See :meth:`Session.freeze`."""
        self._meet(Call.REMEDY, "freeze", layer)
        return self._remedy(partial(remedies.freeze, self.model, layer), layer)

    def merge(self, receipt: Receipt) -> RemedyReceipt:
        """See :meth:`Session.merge`."""
        adaptation = self.changes.of_receipt(receipt)

        def merge(**around: Any) -> RemedyReceipt:
            # Only the process that decides knows the verdict.
            if self._ranks.decides and adaptation.state is not AdaptationState.KEPT:
                raise ConfigurationError("only a kept graft is merged; this one is on probation")
            return remedies.merge(self.model, receipt, **around)

        self._meet(Call.REMEDY, "merge", adaptation.uid)
        return self._remedy(merge, adaptation.layer, merged=adaptation)

    def _remedy(
        self,
        act: Callable[..., RemedyReceipt],
        layer: str,
        *,
        merged: Adaptation | None = None,
        changes_nothing: bool = False,
        catalogue: bool = False,
        finding: str = "",
    ) -> RemedyReceipt:
        """On all ranks, or on none.

        Args:
            merged: the adaptation that it folds into its host.
            catalogue: it is one of the catalogue, and says itself what it cannot change.
        """
        around = self._surroundings
        reason = around.why_unchangeable() if catalogue else around.why_no_remedy()
        if reason and not changes_nothing:
            raise GraftError(reason, layer=layer)
        if not changes_nothing:
            self.settle_snapshots(wait=True)
        started = time.perf_counter()
        with jointly(self._surroundings.replicas) as joint:
            receipt = act(surroundings=self._without_copies, step=self._run.step)
            try:
                # A rank that has failed is known before DDP's reducer is rebuilt on the others.
                joint.same(_state_of(receipt), last=receipt.changed_nothing)
                if not receipt.changed_nothing:
                    joint.commit()
            except BaseException:
                if not joint.done:
                    receipt.undo_here()
                    receipt.end()
                raise
        if receipt.changed_nothing:
            self.changes.observed |= {receipt.adaptation} - {""}
        else:
            self.changes.add_remedy(receipt, merged)
            self._say_what_can_be_undone()
            self._follow_up()
        receipt.pause_ms = (time.perf_counter() - started) * 1e3  # all that the loop waited for
        self._reports.remedy(receipt, merged, finding)
        return receipt

    def _undo_remedy(
        self, receipt: RemedyReceipt, *, ordered: RemedyReceipt | None = None
    ) -> UndoReceipt:
        """Brings back the state before it; remedies that came later go with it."""
        before = tuple(self.changes.remedies)
        if ordered is None:
            self._meet(Call.UNDO, self.changes.place_of(receipt))
        if receipt not in self.changes.remedies:
            raise UndoError("this remedy is not in effect any more", layer=receipt.layer)
        report = receipt.undo()
        self._run.take_back(receipt.step)
        self.changes.drop_since(receipt)
        self._follow_up()
        self._say_what_was_kept(receipt.remedy, receipt.layer, report)
        self._report_undone(before, report, ordered=ordered)
        return report

    def _end_remedy(
        self, receipt: RemedyReceipt, *, ordered: RemedyReceipt | None = None
    ) -> UndoReceipt:
        """Ends what it does in each step; everything that came later stays."""
        before = tuple(self.changes.remedies)
        if ordered is None:
            self._meet(Call.UNDO, self.changes.place_of(receipt), "soft")
        if receipt not in self.changes.remedies:
            raise UndoError("this remedy is not in effect any more", layer=receipt.layer)
        report = receipt.undo(hard=False)
        self.changes.forget(receipt)
        self._report_undone(before, report, ordered=ordered)
        return report

    def take_back_for_server(self, receipt: RemedyReceipt, *, hard: bool) -> UndoReceipt:
        """As the server ordered: to the state before it, or only what it does in each step.

        A remedy that has changed the run once has nothing to end, and what stays of a new start
        fits its weights: it ends with them alone.
        """
        self._ranks.order(Order.take_back(receipt.adaptation, hard=hard))
        if hard:
            return self._undo_remedy(receipt, ordered=receipt)
        if receipt.in_force and not get_remedy(receipt.remedy).begins_anew:
            return self._end_remedy(receipt, ordered=receipt)
        if receipt.in_force:
            receipt.adaptation = ""  # from now on it is the run's own
            return UndoReceipt(hard=False, exact=False, pause_ms=0.0)
        self.changes.forget(receipt)
        receipt.forget_snapshot()
        return UndoReceipt(hard=False, exact=False, pause_ms=0.0)

    # -- what needs no change ------------------------------------------------------------------

    @contextmanager
    def without(self, adaptation: Adaptation) -> Iterator[None]:
        """Inside it, the graft is not in the model's forward pass."""
        slot = slot_of(find_host(self.model, adaptation.layer))
        assert slot is not None
        with slot.without(adaptation.blueprint):
            yield

    def on_step(self) -> None:
        """An optimizer step is over: grafts that follow a schedule move on."""
        if self._idle_slots:
            self.remove_idle_slots()
        self.settle_snapshots()
        if self.changes.grafted:
            self.notice_gone()
        for entry in self.changes.grafted:
            if entry.receipt is not None:
                entry.layer = entry.receipt.layer
                entry.receipt.graft.on_step()
                # Compiled code does not attach hooks to the host.
                entry.receipt.graft.attach(find_host(self.model, entry.layer))

    def settle(self, uid: str, state: str) -> None:
        """The server's last state of a graft that came out of a checkpoint."""
        entry = self.changes.find(uid)
        if entry is not None and state == AdaptationState.KEPT:
            entry.state = AdaptationState.KEPT

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The grafts, their weights, all optimizer state by name, and the remedies."""
        return checkpoint.state_of(self.model, self._surroundings, self.changes)

    def load_state_dict(self, state: dict[str, Any], joint: Joint) -> None:
        """Rebuild what :meth:`state_dict` described; see :func:`checkpoint.load`."""
        if self.changes.grafted:
            raise ConfigurationError("this model carries grafts already; load into a fresh one")
        adaptations, receipts = checkpoint.load(
            self.model, self._surroundings, state, joint, self.stop
        )
        self.changes.resume(adaptations, receipts)
        for adaptation in adaptations:
            self._follow_loads(adaptation)

    # -- plain states that the script loads ----------------------------------------------------

    def follow_state(self, difference: Difference) -> None:
        """The script loads a state with other grafts: the model gets those of the state.

        Each rank does so by itself, because scripts often load the best state for a last test on
        one rank alone: it would wait for the others in vain.

        Raises:
            ConfigurationError: a graft of the state cannot be built here; the model is as before.
        """
        grafting.check_manifest(self.model, difference.coming, self._surroundings)
        for layer, slug in difference.leaving:
            slot = slot_of(find_host(self.model, layer))
            if slot is not None and slug in slot.grafts():
                slot.leave(slug)
        if difference.coming:
            self._bring_back(difference.coming)

    def _bring_back(self, entries: Sequence[dict[str, Any]]) -> None:
        """Builds grafts that were in the model when the state was saved; torch loads the weights.

        They count as kept: the script chose the state that has them.
        """
        receipts = grafting.rebuild(self.model, entries, self._surroundings)
        grafting.let_follow(self.model, self._surroundings.copies)
        self._tell_replicas()
        for receipt in receipts:
            adaptation = self.changes.bring_back(receipt)
            self._follow_loads(adaptation)
            self._reports.came_back(adaptation)
            self._findings.add(came_back(adaptation))
        self._follow_up(restored=True)

    def _tell_replicas(self) -> None:
        """DDP's reducer is made for the present parameters; no rank waits for another."""
        if self._surroundings.replicas is not None:
            self._surroundings.replicas.parameters_changed()

    def _follow_loads(self, adaptation: Adaptation) -> None:
        """A loaded state without this graft takes it out of the model and of this record."""
        slot = slot_of(find_host(self.model, adaptation.layer))
        if slot is None or adaptation.blueprint not in slot.grafts():
            return
        mine = weakref.ref(self)  # the session ends when its script drops it

        def leave() -> bool:
            surgery = mine()
            return surgery is not None and surgery._left_by_load(adaptation)

        slot.on_leave(adaptation.blueprint, leave)
        framework_loads.install()

    def _left_by_load(self, adaptation: Adaptation) -> bool:
        """True: a finding tells of it."""
        self._tell_replicas()
        gone = self.changes.mark_gone(AdaptationState.REVERTED)
        adaptation.left_by_load = True
        if adaptation.receipt is not None:
            adaptation.receipt.forget_snapshot()
        self._idle_slots = True
        self._follow_up(restored=True)
        report = UndoReceipt(hard=False, exact=False, pause_ms=0.0)
        self._reports.taken_out(gone, report, self._run.step, RemedyKind.UNDO, meant=adaptation)
        self._reports.left_by_load(gone)
        self._findings.add(left_by_load(adaptation))
        return True

    # -- what follows a change -----------------------------------------------------------------

    def _follow_up(self, *, restored: bool = False) -> None:
        self._run.wake()
        if self.sampler is not None:
            self.sampler.refresh()
        self._ledger.on_change(restored=restored)

    def _meet(self, call: Call, *arguments: object) -> None:
        """All ranks, for a call that the script makes on each of them."""
        self._ranks.meet(call, self._run.step, *arguments)

    def settle_snapshots(self, *, wait: bool = False) -> None:
        """Looks whether snapshots have arrived on disk.

        Args:
            wait: until they have; before the next one is taken, so that one copy at most is in
                memory beyond the limit.
        """
        self.changes.finish_spilling(wait=wait)
        self._say_what_can_be_undone()

    def _say_what_can_be_undone(self) -> None:
        if not self._ranks.alone:  # at the same step on all ranks
            self.changes.finish_spilling(wait=True)
        shortened, self.changes.shortened = self.changes.shortened, None
        if shortened is not None and not self._told_of_limit:
            self._told_of_limit = True
            why = self.changes.disk_error
            self._findings.add(fewer_snapshots(*shortened, self._snapshot_limit, why))

    def _say_what_was_kept(self, change: str, layer: str, report: UndoReceipt) -> None:
        if report.kept or report.not_restored or report.rewound:
            self._findings.add(undone_in_part(change, layer, report))

    def _report_undone(
        self,
        before: Sequence[RemedyReceipt],
        report: UndoReceipt,
        *,
        ordered: RemedyReceipt | None = None,
    ) -> None:
        undone = [receipt for receipt in before if receipt not in self.changes.remedies]
        self._reports.undone(undone, report, self._run.step, ordered=ordered)


def _state_of(receipt: RemedyReceipt) -> str:
    """Which state of the run it has brought back: the same on all ranks."""
    return repr([receipt.details.get(name) for name in ("to_step", "restored_step")])
