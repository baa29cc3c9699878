"""A run's session: what a training loop calls once per step.

step(loss)    schedules   grafts that replace their layer do so a little more
              ledger      now and then: does all that should learn move
              guard       a diverging loss takes the youngest graft on probation out, at once
              commands    grafts and undos that are due, here and nowhere else
              evaluation  held-out loss; with each graft on and off
              health      a frame, when one is due
              telemetry   into a bounded queue; another thread sends it
              local loop  without a server: decide, graft, judge in this process
"""

from __future__ import annotations

import atexit
import logging
import math
import platform
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from esper import blueprints, grafting
from esper.compilation import capability
from esper.contracts import (
    AdaptationState,
    Finding,
    HealthFrame,
    LayerInfo,
    RemedyKind,
    RunMode,
    SafetyPolicy,
    ViolationRule,
)
from esper.contracts.codec import number_to_wire
from esper.exceptions import ConfigurationError, EsperError, UndoError, UnknownLayerError
from esper.grafting import (
    GuardVerdict,
    LayerRecorder,
    LossGuard,
    MovementWatch,
    Receipt,
    RemedyReceipt,
    Replicas,
    UndoReceipt,
    remedies,
)
from esper.grafting.replicas import Call, Joint, jointly
from esper.health import HealthSampler
from esper.sdk.command_handler import CommandHandler, Operations, failed
from esper.sdk.compiler_watch import CompilerWatch
from esper.sdk.evaluation import Evaluator
from esper.sdk.findings import Findings, divergence, switched_off
from esper.sdk.local import LocalLoop, Waiting
from esper.sdk.loss import LossReader
from esper.sdk.ranks import Order, Ranks
from esper.sdk.saving import losses_from_state, losses_to_state, reading_a_state
from esper.sdk.surgeon import Adaptation, Operation, Surgeon
from esper.sdk.transport.commands import LocalVeto
from esper.sdk.transport.kernels import code_key
from esper.sdk.transport.queues import Pace, PendingReport, TransportQueues
from esper.sdk.transport.registration import RunDescription
from esper.sdk.transport.reporting import SurgeryReports
from esper.sdk.transport.transport import Transport

logger = logging.getLogger("esper")

MAX_PART_FAILURES = 3
LOSSES_KEPT = 4_000
LEFT_ALONE = "attach was told to leave it alone"
AUDIT_EVERY_STEPS = 100  # what is frozen or regrouped by the user's own code is seen this late


class RunStopped(EsperError):
    """A person stopped the run; raised by ``session.step`` at a step boundary."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What ``attach`` made of its arguments."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    schedulers: tuple[Any, ...]
    scaler: Any
    run: str
    server: str  # empty: local mode
    token: str
    mode: RunMode
    slots: tuple[str, ...]
    evaluate: Callable[[], float | None] | None
    target_steps: int | None
    safety_policy: SafetyPolicy
    pace: Pace
    copies: tuple[Any, ...] = ()
    replicas: Replicas | None = None  # the other ranks


class Session:
    """One attached run; made by :func:`esper.attach`. Use it in the training thread only."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._model = setup.model
        self._ranks = Ranks(setup.replicas)
        self._surgeon = Surgeon(
            setup.model,
            setup.optimizers,
            setup.schedulers,
            setup.scaler,
            setup.copies,
            setup.replicas,
        )
        self._recorder = LayerRecorder(setup.model)
        self._guard = LossGuard()
        self._reader = LossReader()
        self._evaluator = (
            Evaluator(setup.model, setup.evaluate) if setup.evaluate is not None else None
        )
        self._sampler: HealthSampler | None = None
        self._transport: Transport | None = None
        self._handler: CommandHandler | None = None
        self._connect()
        self._reports = SurgeryReports(self._queue_report)
        self._local = (
            LocalLoop(self._surgeon, self._guarded_policy)
            if self._ranks.decides and not setup.server
            else None
        )
        self._layers: tuple[LayerInfo, ...] = ()
        self._model_parameters = _count(setup.model)
        self._step = 0
        self._losses: deque[tuple[int, float]] = deque(maxlen=LOSSES_KEPT)
        self._reported: dict[str, float] = {}
        self._findings = Findings(self._tell_finding)
        self._latest_frame: HealthFrame | None = None
        self._failures: dict[str, int] = {}
        self._compiler = CompilerWatch()
        self._closed = False
        self._movement = MovementWatch(setup.model, setup.optimizers)
        self._audit()
        self._at_exit = _close_at_exit(self)

    # -- what a training loop calls ------------------------------------------------------------

    def step(self, loss: float | Tensor) -> None:
        """Call once per optimizer step, after ``optimizer.step()``, while gradients exist.

        Args:
            loss: this step's training loss, a number or a tensor of one element.

        Raises:
            RunStopped: a person stopped the run.
            TypeError: ``loss`` is neither.
            ReplicaError: the ranks do not call the same in the same order.
            RuntimeError: torch's own, when another rank is gone.
        """
        value = self._reader.read(loss)
        if self._closed:
            raise ConfigurationError("this session is closed; attach again to go on")
        self._step += 1
        value, busy = self._ranks.meet_for_step(self._step, value, self._may_operate)
        if not self._layers:
            self._try("opening", self._open)
        # Before anything that may undo: a snapshot is taken after it, so that what comes back is
        # what the next step would have met.
        self._try("schedules", self._surgeon.on_step)
        self._try("ledger", self._watch_movement)
        if value is not None:
            self._losses.append((self._step, value))
        metrics = self._take_metrics(value)
        self._try("compiler", partial(self._watch_compiler, metrics))
        if self._ranks.decides:
            with self._ranks.leading(busy, lambda: self._stop_reason):
                self._decide(value, loss, metrics, busy=busy)
        elif busy:
            self._ranks.follow(self._prepare)
        if self._stop_reason:
            raise RunStopped(self._stop_reason)

    def _decide(
        self, value: float | None, loss: float | Tensor, metrics: dict[str, float], *, busy: bool
    ) -> None:
        """A step of the process that decides; nothing is changed or evaluated unless ``busy``."""
        if value is not None:
            self._try("guard", partial(self._watch_over, value))
        if self._handler is not None and busy:
            self._try("commands", self._obey)
        if self._evaluator is not None and busy:
            self._try("evaluation", partial(self._evaluate, metrics))
        self._try("health", partial(self._look, loss, metrics))

    def report(self, **metrics: float) -> None:
        """More numbers for this step, such as ``accuracy=0.93``; sent with the next ``step``.

        Raises:
            TypeError: a value is not a number.
        """
        for name, value in metrics.items():
            if isinstance(value, str | bool | bytes):
                raise TypeError(f"{name} must be a number, got {value!r}")
            self._reported[name] = float(value)

    def close(self, *, reason: str = "", failed: bool = False, timeout: float = 10.0) -> None:
        """End the run. Grafts stay in the model.

        Args:
            timeout: how many seconds to wait for the server to take what is left, at most.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._recorder.stop()
        self._movement.close()
        if self._sampler is not None:
            self._sampler.close()
        if self._transport is not None:
            self._refuse_the_rest(self._transport)
            state = "failed" if failed else "finished"
            finish = {"step": self._step, "state": state, "reason": reason or self._stop_reason}
            self._transport.close(finish, timeout=timeout)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stopped = error is None or isinstance(error, RunStopped)
        self.close(reason=reason_of(error), failed=not stopped)

    # -- looking -------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The model's layers; shapes are known after the first forward pass.

        On several ranks the last one, with an empty name, is the model that they share.
        """
        return (self._layers or self._recorder.layers()) + self._ranks.shared_layers

    @property
    def adaptations(self) -> tuple[Adaptation, ...]:
        """Everything that was grafted in this session, oldest first."""
        return tuple(self._surgeon.adaptations)

    @property
    def remedies(self) -> tuple[RemedyReceipt, ...]:
        """Remedies that are in effect, oldest first."""
        return tuple(self._surgeon.remedies)

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """Local mode: decisions that a person must take; see :meth:`approve`."""
        return self._local.waiting if self._local is not None else ()

    @property
    def run(self) -> str:
        """The run's id at the server; empty in local mode, and until it has registered."""
        registration = self._transport.registration if self._transport else None
        return registration.run if registration else ""

    @property
    def telemetry(self) -> dict[str, int]:
        """Items offered, stored by the server, dropped, waiting."""
        queue = self._transport.queues.telemetry if self._transport is not None else None
        if queue is None:
            return {"offered": 0, "stored": 0, "dropped": 0, "waiting": 0}
        return {
            "offered": queue.offered,
            "stored": queue.stored,
            "dropped": queue.dropped,
            "waiting": len(queue),
        }

    def frame(self) -> HealthFrame | None:
        """The latest health frame, None before the first."""
        return self._latest_frame

    def findings(self) -> list[Finding]:
        """What is wrong with the run: optimizer ledger, divergence, Esper's own failures."""
        if not self._closed:
            self._try("ledger", self._audit)
        return self._findings.all()

    # -- changing ------------------------------------------------------------------------------

    def graft(self, layer: str, blueprint: str, **config: Any) -> Receipt:
        """Graft now, between two steps, by a person's or a script's own will.

        On several ranks each of them must call it, with the same arguments.

        Args:
            layer: a layer that has been seen to run.
            blueprint: slug or id.
            config: the blueprint's settings; what is missing takes its default.

        Raises:
            UnknownBlueprintError, UnknownLayerError, IncompatibleLayerError, ConfigurationError:
                before anything is touched.
            CertificateError: it would change what the model computes; the model is as before.
            ReplicaError: another rank could not do it, or did not want the same.
        """
        operation = Operation(
            layer=self._layer(layer),
            blueprint=blueprints.get_blueprint(blueprint),
            config=config,
            seed=self._step + 1,
            uid=self._surgeon.next_uid(),
        )
        self._ranks.meet(Call.GRAFT, self._step, layer, operation.blueprint.slug, config)
        adaptation = self._apply(operation)
        assert adaptation.receipt is not None
        return adaptation.receipt

    def undo(self, receipt: Receipt | RemedyReceipt, hard: bool = True) -> UndoReceipt:
        """Take a graft out, or undo a remedy; that is always hard. On several ranks each calls it.

        Args:
            hard: bring the whole model back to the bit, as it was before the graft. Else only
                the graft goes, and the host keeps what it has learned since.

        Raises:
            UndoError: it could not be taken out.
        """
        if isinstance(receipt, RemedyReceipt):
            before = self.remedies
            self._ranks.meet(Call.UNDO, self._step, self._surgeon.place_of(receipt))
            undone = self._surgeon.undo_remedy(receipt)
            self._after_surgery()
            self._tell_undone(before, undone)
            return undone
        adaptation = self._adaptation(receipt)
        self._ranks.meet(Call.UNDO, self._step, adaptation.uid, hard)
        return self._take_out_by_script(adaptation, RemedyKind.UNDO, hard=hard)

    def recycle(
        self, layer: str, next_layer: str, sample: Any, *, seed: int | None = None
    ) -> RemedyReceipt:
        """Give dead units a new start; see :func:`esper.grafting.remedies.recycle_dead_units`.

        Raises:
            UnknownLayerError, GraftError: the model is as before.
        """
        seed = self._step + 1 if seed is None else seed
        recycle = partial(
            remedies.recycle_dead_units, self._model, layer, next_layer, sample, seed=seed
        )
        return self._remedy(recycle, "recycle", layer, next_layer, seed)

    def set_lr(self, layer: str, factor: float) -> RemedyReceipt:
        """Let one layer learn ``factor`` times as fast; schedulers keep the ratio.

        Raises:
            UnknownLayerError, ConfigurationError, GraftError: the model is as before.
        """
        set_lr = partial(remedies.set_layer_lr, self._model, layer, factor)
        return self._remedy(set_lr, "set_lr", layer, factor)

    def freeze(self, layer: str) -> RemedyReceipt:
        """Stop a layer from learning. Raises as :meth:`set_lr`."""
        return self._remedy(partial(remedies.freeze, self._model, layer), "freeze", layer)

    def unfreeze(self, layer: str) -> RemedyReceipt:
        """Let a frozen layer learn, in a group of its own. Raises as :meth:`set_lr`."""
        return self._remedy(partial(remedies.unfreeze, self._model, layer), "unfreeze", layer)

    def merge(self, receipt: Receipt) -> RemedyReceipt:
        """Fold a kept graft into its host's weights, so that it costs nothing any more.

        Raises:
            ConfigurationError: the graft is still on probation.
            UndoError, GraftError: it is not in the model, or cannot be merged; nothing changed.
        """
        adaptation = self._adaptation(receipt)

        def merge(**around: Any) -> RemedyReceipt:
            # The verdict is known to the process that decides.
            if self._ranks.decides and adaptation.state is not AdaptationState.KEPT:
                raise ConfigurationError("only a kept graft is merged; this one is on probation")
            return remedies.merge(self._model, receipt, **around)

        return self._remedy(merge, "merge", adaptation.uid, merged=adaptation)

    def prune(self, receipt: Receipt) -> UndoReceipt:
        """Take a graft out for good; the host keeps what it has learned since.

        Raises:
            UndoError: it is not in the model any more.
        """
        adaptation = self._adaptation(receipt)
        self._ranks.meet(Call.UNDO, self._step, adaptation.uid, "prune")
        return self._take_out_by_script(adaptation, RemedyKind.PRUNE, hard=False)

    def _remedy(
        self,
        act: Callable[..., RemedyReceipt],
        remedy: str,
        *arguments: object,
        merged: Adaptation | None = None,
    ) -> RemedyReceipt:
        self._ranks.meet(Call.REMEDY, self._step, remedy, *arguments)
        started = time.perf_counter()
        apply = partial(act, surroundings=self._surgeon.surroundings, step=self._step)
        receipt = self._surgeon.remedy(apply, merged)
        self._after_surgery()
        receipt.pause_ms = (time.perf_counter() - started) * 1e3  # all that the loop waited for
        self._reports.remedy(receipt, merged)
        logger.info("step %d: %s at %s", self._step, receipt.remedy, receipt.layer)
        return receipt

    def _adaptation(self, receipt: Receipt) -> Adaptation:
        found = self._surgeon.by_receipt(receipt)
        if found is None or found.merged:
            raise UndoError("this graft is not in the model any more", layer=receipt.layer)
        return found

    def approve(self, waiting: Waiting) -> Receipt:
        """Local mode: say yes to a waiting decision. Raises as :meth:`graft`."""
        if self._local is None:
            raise ConfigurationError("with a server, decisions are approved there")
        if not self._ranks.alone:
            raise ConfigurationError(
                "on several ranks, call session.graft(layer, blueprint) on each of them"
            )
        adaptation = self._apply(self._local.take_approved(waiting, self._step))
        assert adaptation.receipt is not None
        return adaptation.receipt

    def reject(self, waiting: Waiting) -> None:
        """Local mode: say no to a waiting decision."""
        if self._local is not None:
            self._local.reject(waiting)

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model and the optimizer.

        Load it first: it rebuilds the grafts, so that the model's and the optimizer's own states
        fit again. It also holds the grafts' weights and all optimizer state by parameter name.
        """
        registration = self._transport.registration if self._transport else None
        return {
            "format": 1,
            "run": registration.run if registration else "",
            "epoch": registration.epoch if registration else 0,
            "step": self._step,
            "guard": self._guard.state_dict(),
            "losses": losses_to_state(self._losses),
            "local": self._local.state_dict() if self._local is not None else None,
            **self._surgeon.state_dict(),
        }

    def load_state_dict(self, state: Any) -> None:
        """Rebuild the grafts of a checkpoint and load their weights and optimizer state.

        Call it after ``attach`` and before the first ``step``. All of it is taken or nothing: when
        it raises, model, optimizer and session are as before. On several ranks each of them must
        call it, and it is taken on all of them or on none.

        Raises:
            ConfigurationError: it is no such state, not one of this model, or training has begun.
            ReplicaError: another rank could not take it, or was given another one.
        """
        self._ranks.meet(Call.LOAD, self._step, _identities(state))
        if not isinstance(state, dict) or state.get("format") != 1:
            raise ConfigurationError("this is not the state of an Esper session")
        if self._step:
            raise ConfigurationError("load a session's state before its first step")
        with reading_a_state(), jointly(self._setup.replicas) as joint:
            self._load(state, joint)
        self._movement.restart()
        self._audit()

    def plain_optimizer_states(self) -> list[dict[str, Any]]:
        """Each optimizer's ``state_dict()`` as it would be had nothing been grafted.

        For a checkpoint that a framework loads before Esper has rebuilt the grafts.
        """
        return self._surgeon.plain_optimizer_states()

    def _load(self, state: dict[str, Any], joint: Joint) -> None:
        guard, losses = LossGuard(), losses_from_state(state["losses"])
        guard.load_state_dict(state["guard"])
        local = LocalLoop(self._surgeon, self._guarded_policy) if self._local is not None else None
        if local is not None and state["local"] is not None:
            local.load_state_dict(state["local"])
        step = int(state["step"])
        if step < 0:
            raise ConfigurationError(f"a session cannot have taken {step} steps")
        self._surgeon.load_state_dict(state, joint)
        self._guard, self._local, self._step = guard, local, step
        self._losses.extend(losses)

    # -- opening -------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Make what a server needs; nothing is sent before the first step."""
        setup = self._setup
        if not setup.server or not self._ranks.decides:
            return
        veto, queues = LocalVeto(setup.mode, code_key=code_key()), TransportQueues()
        surgeon = self._surgeon
        operations = Operations(
            layer=self._layer,
            reserve_memory=surgeon.reserve_memory,
            find=surgeon.find,
            apply=self._apply,
            take_out=self._take_out_as_told,
            model=self._model,
        )
        self._handler = CommandHandler(operations, veto, queues)
        self._transport = Transport(
            setup.server,
            setup.token,
            queues,
            veto=veto,
            prepare=self._handler.prepare,
            try_out=self._handler.try_out,
            pace=setup.pace,
        )

    def _open(self) -> None:
        """At the first complete step the layers are known: watch them, and register the run."""
        self._layers = self._watched_layers()
        self._recorder.stop()
        if any(layer.reason == LEFT_ALONE for layer in self._layers):
            # Code that was compiled in this first step is split where the recorder looked, and
            # torch does not notice that it has gone. Where every layer has a slot, it stays split.
            torch.compiler.reset()
        if not self._ranks.decides:
            return
        self._sampler = HealthSampler(
            self._model,
            self._setup.optimizers,
            self._layers,
            watch=partial(grafting.watch, self._model),
        )
        if self._transport is not None:
            self._transport.start(self._describe())
        if self._local is not None:
            self._local.open(
                run=self._setup.run,
                mode=self._setup.mode,
                layers=self._layers,
                model_parameters=self._model_parameters,
            )

    def _watched_layers(self) -> tuple[LayerInfo, ...]:
        """The recorder's layers; those without a slot are watched and never grafted."""
        slots = set(self._setup.slots)
        return tuple(
            layer
            if layer.name in slots or not layer.graftable
            else replace(layer, graftable=False, reason=LEFT_ALONE)
            for layer in self._recorder.layers()
        )

    def _capabilities(self) -> dict[str, str]:
        """By device: one run may need kernels for several."""
        return {device: capability(device) for device in {layer.device for layer in self._layers}}

    def _describe(self) -> RunDescription:
        from esper import __version__

        return RunDescription(
            name=self._setup.run,
            mode=self._setup.mode,
            capability=capability(),
            capabilities=self._capabilities(),
            target_steps=self._setup.target_steps,
            versions={
                "torch": torch.__version__,
                "python": platform.python_version(),
                "esper": __version__,
                **({"machine_code": "taken"} if code_key() else {}),
            },
            model_parameters=self._model_parameters,
            layers=self._layers,
            step=self._step,
            applied=[
                {
                    "adaptation": entry.uid,
                    "layer": entry.layer,
                    "blueprint": entry.blueprint,
                    "step": entry.step,
                    "merged": entry.merged,
                }
                for entry in self._surgeon.grafted
                if not entry.local
            ],
        )

    # -- the guard -----------------------------------------------------------------------------

    def _watch_over(self, loss: float) -> None:
        verdict = self._guard.observe(loss)
        patient = self._surgeon.youngest_on_probation(self._step)
        if verdict is None and patient is not None and self._setup.scaler is None:
            # With a scaler, non-finite gradients are its daily business: it skips such steps.
            verdict = _gradient_verdict(self._model)
        if verdict is None:
            return
        if patient is not None:
            self._roll_back(patient, verdict)
        else:
            self._findings.add(divergence(verdict))
            self._guard.reset()  # said once; from here on the new level is what it is judged by

    def _roll_back(self, patient: Adaptation, verdict: GuardVerdict) -> None:
        hard = patient.restorable
        report, gone = self._take_out(patient, hard=hard, state=AdaptationState.ROLLED_BACK)
        self._guard.reset()
        logger.warning(
            "step %d: %s; %s was taken out of %s%s",
            self._step,
            verdict.text,
            patient.blueprint,
            patient.layer,
            f", the model is as it was after step {patient.step}" if report.exact else "",
        )
        if self._local is not None:
            self._local.on_rolled_back(gone, self._step, verdict.text)
        for entry in gone:
            if not entry.local:
                self._queue_report(
                    PendingReport("rollbacks", self._rollback_body(entry, verdict, report))
                )

    def _queue_report(self, report: PendingReport) -> None:
        if self._transport is not None:
            self._transport.queue_report(report)

    def _rollback_body(
        self, entry: Adaptation, verdict: GuardVerdict, report: UndoReceipt
    ) -> dict[str, Any]:
        return {
            "adaptation": entry.uid,
            "step": self._step,
            "rule": str(verdict.rule),
            "observed": number_to_wire(verdict.observed),
            "limit": number_to_wire(verdict.limit),
            "pause_ms": report.pause_ms,
            "exact": report.exact,
            "digest_after": report.digest,
        }

    def _watch_compiler(self, metrics: dict[str, float]) -> None:
        recompiles = self._compiler.recompiles()
        if recompiles:
            metrics["recompiles"] = float(recompiles)
        finding = self._compiler.finding()
        if finding is not None:
            self._findings.add(finding)

    # -- commands ------------------------------------------------------------------------------

    def _obey(self) -> None:
        transport, handler = self._transport, self._handler
        if transport is None or handler is None:
            return
        while transport.queues.inbox:
            answer = handler.carry_out(transport.queues.inbox.popleft())
            transport.answer(replace(answer.ack, step=self._step), answer.digests)

    @property
    def _stop_reason(self) -> str:
        return self._handler.stop_reason if self._handler is not None else self._ranks.stop_reason

    def _refuse_the_rest(self, transport: Transport) -> None:
        while transport.queues.inbox:
            command = transport.queues.inbox.popleft().command
            ack = failed(command, "the run ended before its next step boundary")
            transport.answer(replace(ack, step=self._step))

    # -- grafting ------------------------------------------------------------------------------

    def _layer(self, name: str) -> LayerInfo:
        found = next((layer for layer in self.layers if layer.name == name), None)
        if found is None:
            raise UnknownLayerError(f"the model has no layer {name!r}", layer=name)
        return found

    def _apply(self, operation: Operation) -> Adaptation:
        self._ranks.order(Order.graft(operation))
        adaptation = self._surgeon.apply(operation, step=self._step)
        adaptation.guarded_until = self._step + self._guarded_policy().probation_steps
        adaptation.loss_before = tuple(self._losses)
        self._after_surgery()
        return adaptation

    def _take_out(
        self, adaptation: Adaptation, *, hard: bool, state: AdaptationState
    ) -> tuple[UndoReceipt, tuple[Adaptation, ...]]:
        before = self.remedies
        self._ranks.order(Order.undo(adaptation.uid, hard=hard, state=state))
        report, gone = self._surgeon.undo(adaptation, hard=hard, state=state)
        self._movement.restart()
        self._after_surgery()
        self._tell_undone(before, report)
        return report, gone

    def _take_out_as_told(
        self, adaptation: Adaptation, *, hard: bool, state: AdaptationState
    ) -> tuple[UndoReceipt, tuple[Adaptation, ...]]:
        """By the server, which does not know of those that have to go along."""
        report, gone = self._take_out(adaptation, hard=hard, state=state)
        others = [entry for entry in gone if entry is not adaptation]
        self._reports.taken_out(others, report, self._step, RemedyKind.UNDO, meant=adaptation)
        return report, gone

    def _take_out_by_script(
        self, adaptation: Adaptation, remedy: RemedyKind, *, hard: bool
    ) -> UndoReceipt:
        report, gone = self._take_out(adaptation, hard=hard, state=AdaptationState.REVERTED)
        self._reports.taken_out(gone, report, self._step, remedy, meant=adaptation)
        return report

    def _tell_undone(self, before: tuple[RemedyReceipt, ...], report: UndoReceipt) -> None:
        undone = [receipt for receipt in before if receipt not in self._surgeon.remedies]
        self._reports.undone(undone, report, self._step)

    def _may_operate(self) -> bool:
        """This step may change or evaluate the model, which the other ranks must know before."""
        commands = self._transport is not None and bool(self._transport.queues.inbox)
        evaluation = self._evaluator is not None and self._evaluator.is_due(self._step)
        decisions = self._local is not None and self._setup.mode is not RunMode.OBSERVE
        return commands or evaluation or decisions or self._surgeon.on_probation

    def _prepare(self, order: Order) -> Callable[[], object]:
        """On a rank that does not decide: what rank 0 does at this moment."""
        if order.kind == "graft":
            return partial(self._apply, order.operation(self._layer))
        adaptation = self._surgeon.find(order.adaptation) if order.adaptation else None
        if order.kind == "evaluate" and not order.adaptation:
            return partial(self._measure, None)
        if adaptation is None:
            raise UndoError(f"this rank does not hold {order.adaptation!r}", layer=order.layer)
        if order.kind == "evaluate":
            return partial(self._measure, adaptation)
        state = AdaptationState(order.state)
        return partial(self._take_out, adaptation, hard=order.hard, state=state)

    def _after_surgery(self) -> None:
        if self._sampler is not None:
            self._sampler.refresh()
        self._movement.include_new()
        self._audit()

    # -- the optimizer's books -----------------------------------------------------------------

    def _audit(self) -> None:
        self._findings.replace_ledger([*self._surgeon.audit(), *self._movement.findings])

    def _watch_movement(self) -> None:
        looked = self._movement.step()
        if looked or self._step % AUDIT_EVERY_STEPS == 0:
            self._audit()

    def _guarded_policy(self) -> SafetyPolicy:
        registration = self._transport.registration if self._transport else None
        return registration.policy if registration else self._setup.safety_policy

    # -- looking and telling -------------------------------------------------------------------

    def _take_metrics(self, loss: float | None) -> dict[str, float]:
        metrics, self._reported = self._reported, {}
        if loss is not None:
            metrics["loss"] = loss
        return metrics

    def _evaluate(self, metrics: dict[str, float]) -> None:
        assert self._evaluator is not None
        for entry in self._surgeon.due_for_ablation(self._step, self._guarded_policy()):
            self._ranks.order(Order.evaluate(entry.uid))
            self._measure(entry)
            if not math.isnan(entry.ablation_gain):
                metrics[f"ablation_gain:{entry.uid}"] = entry.ablation_gain
        if self._evaluator.is_due(self._step):
            self._ranks.order(Order.evaluate())
            loss = self._measure(None)
            if not math.isnan(loss):
                metrics["eval_loss"] = loss

    def _measure(self, without: Adaptation | None) -> float:
        """The held-out loss, or what one graft takes off it; mean of all ranks."""
        evaluator = self._evaluator
        assert evaluator is not None
        if without is None:
            return self._ranks.mean(lambda: evaluator.due_loss(self._step))
        gain = self._ranks.mean(lambda: evaluator.ablation_gain(self._surgeon.without(without)))
        without.ablation_gain = gain
        return gain

    def _look(self, loss: float | Tensor, metrics: dict[str, float]) -> None:
        frame = self._sampler.step(self._step, loss, metrics) if self._sampler else None
        if frame is not None:
            self._latest_frame = frame
            metrics = dict(frame.metrics)
        if self._transport is not None:
            self._tell(self._transport, frame, metrics)
        if self._local is not None and frame is not None:
            self._live_locally(self._local, frame)

    def _tell(
        self, transport: Transport, frame: HealthFrame | None, metrics: dict[str, float]
    ) -> None:
        transport.queues.telemetry.offer_metrics(self._step, time.time(), metrics)
        if frame is not None:
            transport.queues.telemetry.offer_frame(frame)
            transport.send_soon()
        while transport.queues.settled:
            self._surgeon.on_settled(*transport.queues.settled.popleft())

    def _live_locally(self, local: LocalLoop, frame: HealthFrame) -> None:
        for entry, verdict in local.verdicts(self._step, self._losses):
            if not verdict.keep:
                self._take_out(entry, hard=False, state=AdaptationState.ROLLED_BACK)
            logger.info(
                "step %d: %s at %s %s: %s",
                self._step,
                entry.blueprint,
                entry.layer,
                entry.state,
                verdict.reason,
            )
        operation = local.consider(frame, self._step, self._losses)
        if operation is not None:
            try:
                self._apply(operation)
            except EsperError as error:
                local.on_failed(operation, self._step)
                logger.warning("step %d: not grafted: %s", self._step, error)

    def _tell_finding(self, finding: Finding) -> None:
        if self._transport is not None:
            self._transport.queues.telemetry.offer_finding(finding)

    def _try(self, part: str, work: Callable[[], None]) -> None:
        """Esper's own errors never reach the training; a part that keeps failing is left out."""
        if self._failures.get(part, 0) >= MAX_PART_FAILURES:
            return
        try:
            work()
        except Exception as error:
            self._failures[part] = self._failures.get(part, 0) + 1
            logger.exception("Esper's %s failed; training goes on", part)
            if self._failures[part] == MAX_PART_FAILURES:
                self._findings.add(switched_off(part, MAX_PART_FAILURES, error))


def _gradient_verdict(model: nn.Module) -> GuardVerdict | None:
    names = grafting.non_finite_gradients(model)
    if not names:
        return None
    return GuardVerdict(
        ViolationRule.NON_FINITE, math.nan, math.nan, f"the gradient of {names[0]} is not finite"
    )


def _identities(state: Any) -> list[Any] | None:
    """What must be the same on all ranks; each has measured its certificates itself.

    None: it is no state, which is said where it is read, on all ranks alike.
    """
    names = ("adaptation", "blueprint", "version", "config", "seed", "step")
    try:
        grafts = [
            [entry["layer"]["name"], *(entry[name] for name in names)]
            for entry in state["structure"]
        ]
        remedies_in = [[r["remedy"], r["layer"], r["details"]] for r in state["remedies"]]
        return [state["step"], grafts, remedies_in]
    except (LookupError, TypeError):
        return None


def reason_of(error: BaseException | None) -> str:
    """What a run that ended like this is told to have died of; empty where it did not."""
    return "" if error is None else str(error) or type(error).__name__


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _close_at_exit(session: Session) -> Callable[[], None]:
    """Ends the run when the script forgot to; holds no reference that keeps a model alive."""
    weak = weakref.ref(session)

    def close() -> None:
        living = weak()
        if living is not None:
            with suppress(Exception):
                error = getattr(sys, "last_value", None)
                living.close(reason=reason_of(error), failed=error is not None, timeout=3.0)

    atexit.register(close)
    return close
