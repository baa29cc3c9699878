"""A run's session: what a training loop calls once per step.

step(loss)    idle        on short steps: nothing is due, so the loss is kept for a later step
              schedules   grafts that replace their layer do so a little more
              ledger      now and then: does the optimizer train all that it should
              guard       a diverging loss takes the youngest graft on probation out, at once
              commands    grafts and undos that are due; they happen only here
              evaluation  held-out loss; with each graft on and off
              health      a frame, when one is due
              telemetry   into a bounded queue; another thread sends it
              local loop  without a server: decide, graft, judge in this process
"""

from __future__ import annotations

import atexit
import logging
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from esper import grafting
from esper.contracts import Finding, HealthFrame, LayerInfo, RunMode, SafetyPolicy, Severity
from esper.diagnosis import weights_digest
from esper.exceptions import ConfigurationError, EsperError
from esper.fail_closed import FailClosed
from esper.grafting import LossGuard, Receipt, RemedyReceipt, Surroundings, UndoReceipt
from esper.grafting.compiled import Compilation
from esper.grafting.graph import count_of
from esper.grafting.replicas import Call, Joint, jointly
from esper.grafting.watching import LayerWatch
from esper.health import HealthSampler
from esper.health.pace import Periods, SamplingPace, periods_of
from esper.health.sharded import ShardedSampler
from esper.policy.heuristic import CAPACITY
from esper.sdk.adaptation import Adaptation
from esper.sdk.announcing import Announcer
from esper.sdk.compiler_watch import CompilerWatch
from esper.sdk.compiling_ahead import CompilingAhead, PauseForecast, usual_pause
from esper.sdk.diagnosing import DiagnosisWatch
from esper.sdk.evaluation import Evaluations
from esper.sdk.explaining import Explainer, Reasons
from esper.sdk.findings import (
    Findings,
    GradientWatch,
    LedgerWatch,
    switched_off,
)
from esper.sdk.following import Follower
from esper.sdk.guarding import ProbationGuard
from esper.sdk.idle_steps import IdleStep, IdleSteps
from esper.sdk.layer_health import LayerHealth
from esper.sdk.layers import Layers
from esper.sdk.loaded_states import LoadedStates
from esper.sdk.local import LocalLoop, LocalMemory, Waiting
from esper.sdk.loss import LossReader
from esper.sdk.proposing import RemedyProposer
from esper.sdk.ranks import Ranks
from esper.sdk.remedy_loop import AFTER_GUARD_STEPS, RemedyLoop, RemedyProposal
from esper.sdk.reporting import SurgeryReports
from esper.sdk.run_state import LossPoint, RunState
from esper.sdk.saving import losses_from_state, losses_to_state, reading_a_state
from esper.sdk.server_link import ServerLink
from esper.sdk.summary import Summary, layer_rows
from esper.sdk.surgery import Surgery
from esper.sdk.tracking import Mirror
from esper.sdk.transport import Pace, TransportQueues
from esper.sdk.twin import Twin, train_twin
from esper.sharding import FrameSum

logger = logging.getLogger("esper")

MAX_PART_FAILURES = 3
INTERRUPTED_SECONDS = 0.3
# What is missing without a part of a step.
UNMEASURED = {
    "opening": "The layers are not known, so nothing is measured.",
    "schedules": "Grafts that replace their layer stay at their present share.",
    "ledger": "Esper does not check that the optimizer trains all that it should.",
    "compiler": "Recompilations are not counted.",
    "compiling ahead": "Grafts are compiled in the training thread.",
    "guard": "Nobody looks for a loss that diverges.",
    "good states": "The run cannot be rewound.",
    "remedies": "No remedy is proposed for a finding.",
    "commands": "Commands of the server are not carried out.",
    "evaluation": "The held-out loss is not measured.",
    "health": "No health frames are made.",
    "diagnosis": "Nobody looks for faults of the run.",
}


class RunStopped(EsperError):
    """A person stopped the run; raised by ``session.step`` at a step boundary."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The checked arguments of ``attach``."""

    model: nn.Module
    surroundings: Surroundings
    run: str
    server: str  # empty: local mode
    token: str
    mode: RunMode
    slots: tuple[str, ...]
    evaluate: Callable[[], float | None] | None
    checkpoint: Callable[[], object] | None
    target_steps: int | None
    safety_policy: SafetyPolicy
    pace: Pace
    snapshot_limit: int  # bytes
    snapshot_folder: Path | None = None
    sampling: tuple[Periods, ...] | None = None  # None: chosen from what sampling costs
    verbose: bool = True
    good_states: Path | None = None  # folder; None: in memory only
    mirror: Mirror | None = None  # the user's trackers
    trained: Any = None  # what the training loop calls: the model, or wrappers around it


class Session:
    """One attached run; made by :func:`esper.attach`. Use it in the training thread only."""

    def __init__(self, setup: Setup) -> None:
        model, around = setup.model, setup.surroundings
        self._setup = setup
        self._ranks = Ranks(around.replicas)
        self._queues = TransportQueues() if setup.server and self._ranks.decides else None
        self._run = RunState(setup.run, setup.mode, setup.safety_policy, self._queues)
        self._announcer = Announcer(
            self._run, verbose=setup.verbose, decides=self._ranks.decides, mirror=setup.mirror
        )
        send = self._queues.telemetry.offer_finding if self._queues is not None else None
        self._findings = Findings(send, self._announcer.finding)
        self._fail_closed = FailClosed(lambda failure: self._findings.add(switched_off(failure)))
        self._compilation = Compilation(model, setup.trained)
        self._layers = Layers(
            model,
            setup.slots,
            around.replicas,
            self._fail_closed,
            self._compilation,
            takes_no_graft=around.takes_no_graft,
        )
        self._ledger = LedgerWatch(model, around, self._findings)
        self._gradients = GradientWatch(self._findings)
        # Its probes read whole tensors, which on one rank alone would wait for the others.
        spread = around.replicas is not None and around.replicas.layout is not None
        self._diagnosis = (
            DiagnosisWatch(
                model, around, self._run, self._findings, self._fail_closed, self._compilation
            )
            if self._ranks.decides and not spread
            else None
        )
        self._surgery = Surgery(
            model,
            around,
            self._run,
            layers=self._layers,
            ranks=self._ranks,
            ledger=self._ledger,
            findings=self._findings,
            snapshot_limit=setup.snapshot_limit,
            snapshot_folder=setup.snapshot_folder,
            state_folder=setup.good_states,
            checkpoint=setup.checkpoint,
            reports=SurgeryReports(self._queues, self._announcer),
        )
        self._loads = LoadedStates(model, self._surgery)
        watched = (
            self._diagnosis.recorder.evaluating if self._diagnosis is not None else nullcontext
        )
        self._evaluations = Evaluations(
            setup.evaluate, self._surgery, self._run, self._ranks, watched
        )
        self._surgery.evaluate = self._evaluations.on_request
        self._follower = Follower(self._ranks, self._surgery, self._evaluations)
        self._remedies = (
            RemedyLoop(
                model,
                self._surgery,
                self._run,
                self._diagnosis,
                self._announcer,
                alone=self._ranks.alone,
                proposer=RemedyProposer(self._queues) if self._queues is not None else None,
            )
            if self._diagnosis is not None
            else None
        )
        self._ahead = CompilingAhead(
            model, self._compilation, self._announcer, evaluates=setup.evaluate is not None
        )
        self._server = (
            ServerLink(
                setup.server,
                setup.token,
                self._queues,
                self._surgery,
                self._run,
                setup.pace,
                self._announcer,
                self._remedies,
                self._ahead,
            )
            if self._queues is not None
            else None
        )
        decides_here = self._ranks.decides and not setup.server
        self._local = (
            LocalLoop(
                self._surgery,
                self._run,
                self._announcer,
                self._findings,
                alone=self._ranks.alone,
                ahead=self._ahead,
            )
            if decides_here
            else None
        )
        self._explainer = Explainer(
            self._run,
            self._layers,
            self._surgery,
            self._findings,
            local=self._local,
            server=self._server,
            remedies=self._remedies,
        )
        self._guard = ProbationGuard(
            self._surgery,
            self._run,
            skips_steps=around.scaler is not None,
            local=self._local,
        )
        self._reader = LossReader()
        self._idle = IdleSteps(
            self._run,
            self._diagnosis.is_usual if self._diagnosis is not None else lambda *_: False,
            self._queues.inbox if self._queues is not None else (),
        )
        self._sampling = SamplingPace(fixed=setup.sampling)
        self._calm = LossGuard()  # tells which states are good; not reset, as the guard's is
        self._health = LayerHealth(self._findings)
        self._compiler = CompilerWatch()
        self._pause_sent: PauseForecast | None = None
        self._model_parameters = _parameters_of(model, around)
        self._reported: dict[str, float] = {}
        self._latest_frame: HealthFrame | None = None
        self._lacks_capacity = False
        self._failures: dict[str, int] = {}
        self._closed = False
        self._detached = False
        self._at_exit = _close_at_exit(self, reports=self._queues is not None)
        self._announcer.attached(
            layers=len(self._layers.own), slots=len(setup.slots), server=setup.server
        )

    # -- what a training loop calls ------------------------------------------------------------

    def step(self, loss: float | Tensor | None = None) -> None:
        """Call once per training step, before or after ``zero_grad()``.

        Args:
            loss: this step's training loss, a number or a tensor of one element. Without it the
                loss of this step is unknown: the guard cannot see it diverge. A loss on a GPU is
                read one step later, so that nothing waits for the GPU; the guard, too, sees it
                one step later.

        Raises:
            RunStopped: a person stopped the run.
            TypeError: ``loss`` is neither.
            ReplicaError: the ranks do not call the same in the same order.
            RuntimeError: torch's own, when another rank has ended.
        """
        run = self._run
        known = self._reader.read(loss, run.step + 1)
        if known is not None and not self._reported and self._idle.take(*known):
            return
        if self._closed:
            raise ConfigurationError("this session is closed; attach again to go on")
        with torch.inference_mode(False):  # some loops compute losses inside, and log them there
            self._whole_step(known, loss)

    def _whole_step(self, known: LossPoint | None, loss: float | Tensor | None) -> None:
        self._catch_up()
        run = self._run
        run.step += 1
        at, value = known if known is not None else (run.step, None)
        value, busy = self._ranks.meet_for_step(run.step, value, self._may_operate, self._meets_now)
        digests = self._ranks.digests(run.step, partial(weights_digest, self._setup.model))
        if self._diagnosis is not None and digests:
            self._diagnosis.rank_digests = digests
        if not self._layers.fixed:
            self._try("opening", self._open)
        # Before anything that may undo: a snapshot is taken after it, so an undo restores what the
        # next step would have used.
        self._try("schedules", self._surgery.on_step)
        if not self._detached:
            self._try("ledger", partial(self._ledger.on_step, run.step))
        if value is not None:
            run.losses.append((at, value))
        self._try("good states", partial(self._keep_good_states, value, run.step))
        metrics = self._take_metrics(value)
        self._try("compiler", partial(self._watch_compiler, metrics))
        self._try("compiling ahead", self._ahead.on_step)
        point = None if value is None else (at, value)
        if self._ranks.alone:
            self._decide(point, loss, metrics, busy=busy)
        elif self._ranks.decides:
            with self._ranks.leading(busy, lambda: self._stop_reason):
                self._decide(point, loss, metrics, busy=busy)
        else:
            if busy:
                self._follower.follow()
            self._try("health", partial(self._take_part, loss))
        if self._remedies is not None and not self._detached:
            self._try("remedies", partial(self._remedies.on_step, self._guard.acted_at))
        self._announcer.on_step()
        if self._stop_reason:
            raise RunStopped(self._stop_reason)
        self._idle.begin(self._idle_until())

    def report(self, **metrics: float) -> None:
        """More numbers for this step, such as ``accuracy=0.93``; sent with the next ``step``.

        Raises:
            TypeError: a value is not a number.
        """
        for name, value in metrics.items():
            if isinstance(value, str | bool | bytes):
                raise TypeError(f"{name} must be a number, got {value!r}")
            self._reported[name] = float(value)

    def detach(self) -> None:
        """Take everything out of the model and its optimizers that holds no graft.

        Hooks and empty slots go, so that ``torch.jit.script``, ``torch.export``, quantisation and
        pickle see the model as it was. Nothing is measured any more: no health frames, and in
        automatic mode no decisions. The other methods work on; :meth:`graft` makes a slot again.
        """
        self._catch_up()
        self._run.wake()
        self._detached = True
        self._layers.stop()
        self._ahead.close()
        self._ledger.close()
        if self._diagnosis is not None:
            self._diagnosis.close()
        self._end_remedies()
        sampler, self._surgery.sampler = self._surgery.sampler, None
        if sampler is not None:
            sampler.close()
        for model in (self._setup.model, *self._surgery.copies):
            grafting.remove_slots(model)
        self._loads.close()

    def close(
        self,
        *,
        reason: str = "",
        failed: bool = False,
        timeout: float = 10.0,
        detach: bool = True,
    ) -> None:
        """End the run. Grafts stay in the model.

        Args:
            timeout: how many seconds to wait, at most, for the server to answer what is left.
            detach: take out all that holds no graft, as :meth:`detach` does. Otherwise empty slots
                stay, and code that torch has compiled with them can be used by a later session.
        """
        if self._closed:
            return
        self._catch_up()
        self._run.wake()
        self._closed = True
        atexit.unregister(self._at_exit)
        sampler, server = self._surgery.sampler, self._server
        ends = [self._layers.stop, self._ahead.close, self._ledger.close, self._end_remedies]
        if sampler is not None:
            ends.append(sampler.close)
        if self._diagnosis is not None:
            ends.append(self._diagnosis.close)
        if detach:
            ends.append(self.detach)
        if server is not None:
            state: Literal["failed", "finished"] = "failed" if failed else "finished"
            ends.append(partial(server.close, state=state, reason=reason, timeout=timeout))
        ends.append(self._announcer.close)
        for place, end in enumerate(ends):
            self._fail_closed.run(
                end,
                part=f"end of the run ({place + 1} of {len(ends)})",
                unmeasured="A hook may stay in the model, or the end of the run is not reported.",
            )

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stopped = error is None or isinstance(error, RunStopped)
        self.close(reason=reason_of(error), failed=not stopped, timeout=patience_for(error))

    def say_attached_twice(self, older: Session) -> None:
        """The model had an open session, which was detached."""
        self._announcer.attached_twice(older._run.name)

    # -- looking -------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """The run has ended."""
        return self._closed

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The model's layers; shapes are known after the first forward pass.

        On several ranks the last one, with an empty name, is the model that they share.
        """
        return self._layers.all

    @property
    def adaptations(self) -> tuple[Adaptation, ...]:
        """Everything that was grafted in this session, oldest first."""
        return tuple(self._surgery.changes.adaptations)

    @property
    def remedies(self) -> tuple[RemedyReceipt, ...]:
        """Remedies that are in effect, oldest first."""
        return tuple(self._surgery.changes.remedies)

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """Local mode: decisions that a person must take; see :meth:`approve`."""
        return self._local.waiting if self._local is not None else ()

    @property
    def sampling(self) -> tuple[tuple[int, int, int], ...]:
        """Which steps were measured: (since step, steps between frames, between activations).

        ``esper.attach(…, sampling=session.sampling)`` makes another run measure at the same steps.
        """
        return tuple((p.since, p.frame, p.deep) for p in self._sampling.recorded)

    @property
    def proposed_remedies(self) -> tuple[RemedyProposal, ...]:
        """Remedies for open findings: they wait for :meth:`approve`, or say what Esper would do."""
        return tuple(self._remedies.proposals) if self._remedies is not None else ()

    @property
    def should_stop(self) -> bool:
        """The remedy ``stop_early`` asks the loop to stop.

        Esper's callbacks for Lightning and transformers obey. A loop of its own looks itself:
        ``if session.should_stop: break``.
        """
        return self._surgery.stop.asked

    @property
    def run(self) -> str:
        """The run's id at the server; empty in local mode, and until it has registered."""
        registration = self._run.registration
        return registration.run if registration is not None else ""

    @property
    def telemetry(self) -> dict[str, int]:
        """Items offered, stored by the server, dropped, waiting."""
        self._catch_up()
        if self._queues is None:
            return {"offered": 0, "stored": 0, "dropped": 0, "waiting": 0}
        return self._queues.telemetry.counts()

    def frame(self) -> HealthFrame | None:
        """The latest health frame, None before the first."""
        return self._latest_frame

    def findings(self, *, resolved: bool = False) -> list[Finding]:
        """What is wrong with the run: its diagnosis, the ledger, Esper's own failures.

        Args:
            resolved: the findings that are over, instead of those that are open.
        """
        if resolved:
            return self._findings.resolved
        if not self._closed:
            self._try("ledger", self._ledger.audit)
        return self._findings.all()

    def why(self, layer: str | None = None) -> Reasons:
        """Why nothing happens: in the run, or at one layer. Prints as a list of sentences.

        In observe mode it also says what a supervised run would be asked.

        Raises:
            UnknownLayerError: the model has no layer of that name.
        """
        if layer is not None:
            return self._explainer.of_layer(layer, self._latest_frame)
        return self._explainer.of_run(self._latest_frame, closed=self._closed)

    def __str__(self) -> str:
        return self._told(lambda: self._summary().text())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._told(lambda: self._summary().html())

    # -- changing ------------------------------------------------------------------------------

    def graft(self, layer: str, blueprint: str, *, since: str = "", **config: Any) -> Receipt:
        """Graft now, between two steps, without a decision of the policy.

        On several ranks each of them must call it, with the same arguments.

        Args:
            layer: a layer that has been seen to run.
            blueprint: slug or id.
            since: an earlier layer, whose input the graft reads, for a graft that spans layers.
            config: the blueprint's settings; what is missing takes its default.

        Raises:
            UnknownBlueprintError, UnknownLayerError, IncompatibleLayerError, ConfigurationError:
                before anything is touched.
            CertificateError: it would change what the model computes; the model is as before.
            ReplicaError: another rank could not do it, or was asked for something else.
        """
        self._catch_up()
        operation = self._surgery.planned(layer, blueprint, since, config)
        self._try("compiling ahead", partial(self._ahead.tell, operation))
        return self._surgery.graft(operation)

    def prepare(self, layer: str, blueprint: str, *, since: str = "", **config: Any) -> bool:
        """Compile a graft's code beside the training, before :meth:`graft` with these arguments.

        A graft into a model that torch.compile has compiled means one recompilation. A process at
        the lowest priority fills the compiler's cache on disk; train on meanwhile, and call this
        again after later steps.

        Returns:
            True: graft now, the code is there, or none is needed, or it cannot be prepared, which
            is said on the console with the pause to expect. False: it is being compiled.

        Raises:
            UnknownBlueprintError, UnknownLayerError, IncompatibleLayerError
        """
        operation = self._surgery.planned(layer, blueprint, since, config)
        return not self._ahead.waits(operation)

    def forecast_pause(
        self, layer: str, blueprint: str, *, since: str = "", **config: Any
    ) -> PauseForecast | None:
        """How long :meth:`graft` would make the next step wait for torch.compile; None: not at all.

        Raises:
            UnknownBlueprintError, UnknownLayerError, IncompatibleLayerError
        """
        return self._ahead.forecast(self._surgery.planned(layer, blueprint, since, config))

    def twin(
        self,
        layer: str | Waiting,
        blueprint: str = "",
        *,
        batches: Sequence[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        evaluate: Callable[[nn.Module], float],
        steps: int = 200,
        seconds: float = 60.0,
        since: str = "",
        **config: Any,
    ) -> Twin:
        """Try a graft in shadow: train a copy of the run with it and one without it.

        It happens here, between two steps, and costs at most ``seconds``. The run stays as it is:
        its weights, its optimizer and its random streams. In local mode a result that is shown
        counts as a closed case of the blueprint.

        Args:
            layer: where, or a decision of :attr:`waiting`, which brings blueprint and settings.
            batches: recorded ones, used in this order, again from the first where they are few.
            loss: the training loss of a model for a batch.
            evaluate: the held-out loss of a model, always on the same data.
            steps: of both copies, at most.
            since, config: as for :meth:`graft`.

        Raises:
            ConfigurationError: on several ranks, with several optimizers, or without a batch.
            The errors of :meth:`graft`.
        """
        if isinstance(layer, Waiting):
            adaptation = layer.decision.adaptation
            blueprint, since = layer.decision.blueprint, adaptation.since
            config, layer = dict(layer.decision.config), adaptation.layer_name
        found = train_twin(
            self._setup.model,
            self._only_optimizer(),
            partial(self._surgery.graft_copy, layer, blueprint, since, config),
            batches=batches,
            loss=loss,
            evaluate=evaluate,
            steps=steps,
            seconds=seconds,
        )
        if self._local is not None:
            self._local.note_twin(found)
        return found

    def _only_optimizer(self) -> Any:
        optimizers = self._setup.surroundings.optimizers
        if not self._ranks.alone or len(optimizers) != 1:
            raise ConfigurationError("a twin needs one process with one optimizer")
        return optimizers[0]

    def undo(self, receipt: Receipt | RemedyReceipt, hard: bool = True) -> UndoReceipt:
        """Take a graft out, or undo a remedy. On several ranks each calls it.

        Args:
            hard: restore the whole model as it was before the graft or remedy, equal to the bit.
                Otherwise only the graft, or what the remedy does in each step, goes, and the host
                keeps what it has learned since.

        Raises:
            UndoError: it could not be taken out.
        """
        self._catch_up()
        return self._surgery.undo(receipt, hard=hard)

    def remedy(
        self, name: str, layer: str = "", *, sample: Any = None, **config: Any
    ) -> RemedyReceipt:
        """Apply a remedy of the catalogue now, between two steps; see ``esper.remedies``.

        On several ranks each of them must call it, with the same arguments.

        Args:
            name: such as ``"set_lr"`` or ``"rewind"``.
            layer: where; empty: the whole run.
            sample: a batch of the model's inputs, for remedies that need one.
            config: the remedy's settings; what is missing takes its default.

        Raises:
            UnknownLayerError, ConfigurationError, GraftError: the model is as before.
        """
        self._catch_up()
        return self._surgery.remedy(name, layer, sample, config)

    def recycle(
        self, layer: str, next_layer: str, sample: Any, *, seed: int | None = None
    ) -> RemedyReceipt:
        """Give dead units a new start, now and when more of them die; the remedy ``recycle``.

        Args:
            next_layer: the only layer that reads the units, apart from a nonlinearity.
            sample: a batch of the model's inputs.
            seed: of the new weights; None: another one at each step.

        Raises:
            UnknownLayerError, GraftError: the model is as before.
        """
        seed = self._run.step + 1 if seed is None else seed
        return self.remedy("recycle", layer, sample=sample, next_layer=next_layer, seed=seed)

    def set_lr(self, layer: str, factor: float) -> RemedyReceipt:
        """Let one layer learn ``factor`` times as fast, whatever schedulers do. Calls multiply.

        Raises:
            UnknownLayerError, ConfigurationError, GraftError: the model is as before.
        """
        return self.remedy("set_lr", layer, factor=factor)

    def freeze(self, layer: str) -> RemedyReceipt:
        """Stop a layer from learning. Raises as :meth:`set_lr`."""
        self._catch_up()
        return self._surgery.freeze(layer)

    def unfreeze(self, layer: str) -> RemedyReceipt:
        """Let a frozen layer learn; the remedy ``thaw``. Raises as :meth:`set_lr`."""
        return self.remedy("thaw", layer)

    def merge(self, receipt: Receipt) -> RemedyReceipt:
        """Fold a kept graft into its host's weights, so that it costs nothing any more.

        Raises:
            ConfigurationError: the graft is still on probation.
            UndoError, GraftError: it is not in the model, or cannot be merged; nothing changed.
        """
        self._catch_up()
        return self._surgery.merge(receipt)

    def prune(self, receipt: Receipt) -> UndoReceipt:
        """Take a graft out for good; the host keeps what it has learned since.

        Raises:
            UndoError: it is not in the model any more.
        """
        self._catch_up()
        return self._surgery.prune(receipt)

    @overload
    def approve(self, waiting: Waiting | str) -> Receipt: ...

    @overload
    def approve(self, waiting: RemedyProposal) -> RemedyReceipt: ...

    def approve(self, waiting: Waiting | RemedyProposal | str) -> Receipt | RemedyReceipt:
        """Say yes to a waiting decision, or to a proposed remedy.

        Args:
            waiting: an entry of :attr:`waiting` or of :attr:`proposed_remedies`, or the name of the
                layer that a decision is for.

        Raises:
            ValueError: it expired, or was taken already.
            The errors of :meth:`graft`.
        """
        self._catch_up()
        if isinstance(waiting, RemedyProposal):
            if self._remedies is None or not self._ranks.alone:
                raise ConfigurationError("on several ranks, call session.remedy on each of them")
            return self._remedies.approve(waiting)
        if self._local is None:
            raise ConfigurationError("with a server, decisions are approved there")
        if not self._ranks.alone:
            raise ConfigurationError(
                "on several ranks, call session.graft(layer, blueprint) on each of them"
            )
        if isinstance(waiting, str):
            waiting = self._local.waiting_for(waiting)
        receipt = self._local.approve(waiting).receipt
        assert receipt is not None
        return receipt

    def reject(self, waiting: Waiting | RemedyProposal | str) -> None:
        """Say no to a waiting decision, or to a proposed remedy; see :meth:`approve`.

        Raises:
            ValueError: no decision waits for a layer of that name.
        """
        if isinstance(waiting, RemedyProposal):
            if self._remedies is not None:
                self._remedies.reject(waiting)
            return
        if self._local is None:
            return
        if isinstance(waiting, str):
            waiting = self._local.waiting_for(waiting)
        self._local.reject(waiting)

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model and the optimizer.

        Load it first: it rebuilds the grafts, so that the model's and the optimizer's own states
        fit again. It also holds the grafts' weights and all optimizer state by parameter name.
        """
        self._catch_up()
        registration, states = self._run.registration, self._surgery.states
        return {
            "format": 1,
            "run": registration.run if registration is not None else "",
            "epoch": registration.epoch if registration is not None else 0,
            "step": self._run.step,
            "guard": self._guard.losses.state_dict(),
            "losses": losses_to_state(self._run.losses),
            "sampling": [list(periods) for periods in self.sampling],
            "local": self._local.memory.to_state() if self._local is not None else None,
            "good_states": states.state_dict() if states is not None else None,
            "treatments": self._remedies.state_dict() if self._remedies is not None else [],
            **self._surgery.state_dict(),
        }

    def load_state_dict(self, state: Any) -> None:
        """Rebuild the grafts of a checkpoint and load their weights and optimizer state.

        Call it after ``attach`` and before the first ``step``. All of it is taken or nothing: when
        it raises, model, optimizer and session are as before. On several ranks each of them must
        call it, and it is taken on all of them or on none.

        Raises:
            ConfigurationError: it is no such state, it is of another model, or training has begun.
            ReplicaError: another rank could not take it, or was given another one.
        """
        self._ranks.meet(Call.LOAD, self._run.step, _identities(state))
        if not isinstance(state, dict) or state.get("format") != 1:
            raise ConfigurationError("this is not the state of an Esper session")
        if self._run.step:
            raise ConfigurationError("load a session's state before its first step")
        with reading_a_state(), jointly(self._setup.surroundings.replicas) as joint:
            self._load(state, joint)
        self._ledger.on_change(restored=True)

    def _load(self, state: dict[str, Any], joint: Joint) -> None:
        losses, guard = losses_from_state(state["losses"]), LossGuard()
        guard.load_state_dict(state["guard"])
        memory = LocalMemory.from_state(state["local"]) if state["local"] is not None else None
        sampling = periods_of(state.get("sampling"))  # absent from older states
        step = int(state["step"])
        if step < 0:
            raise ConfigurationError(f"a session cannot have taken {step} steps")
        self._surgery.load_state_dict(state, joint)
        self._guard.losses, self._run.step = guard, step
        self._run.losses.extend(losses)
        if sampling is not None:
            self._sampling.resume(sampling)
        if self._local is not None:
            self._local.memory = memory or LocalMemory()
        kept = state.get("good_states")  # absent from older states
        if self._surgery.states is not None and kept is not None:
            self._try("good states", partial(self._surgery.states.find_again, kept, step))
        if self._remedies is not None:
            self._remedies.load_state_dict(state.get("treatments", []))  # absent from older ones

    # -- the parts of a summary ----------------------------------------------------------------

    def _summary(self) -> Summary:
        run, layers = self._run, self.layers
        frame, grafts = self._latest_frame, self._surgery.changes.grafted
        notes: dict[str, str] = {}
        for entry in grafts:
            before = f"{notes[entry.layer]}, " if entry.layer in notes else ""
            notes[entry.layer] = f"{before}{entry.blueprint} ({entry.state})"
        if not self._layers.fixed:
            layers = tuple(replace(layer, reason="not seen to run yet") for layer in layers)
        rows, left_out = layer_rows(layers, frame, notes)
        where = self._server.page if self._server is not None else "local"
        measured = f"health of step {frame.step:,}" if frame is not None else "no health frame yet"
        why = self.why()
        return Summary(
            title=(
                f"Esper run {run.name!r}: {run.mode} mode, step {run.step:,}, {where}"
                f"{', closed' if self._closed else ''}\n{len(layers)} layers, {measured}"
            ),
            rows=rows,
            left_out=left_out,
            sections=(
                ("Findings", [str(finding) for finding in self.findings()]),
                ("Adaptations", [str(entry) for entry in self.adaptations]),
                ("Snapshots", [line] if (line := self._surgery.changes.snapshots()) else []),
                ("Remedies in effect", [str(receipt) for receipt in self.remedies]),
                ("Proposed remedies", [str(entry) for entry in self.proposed_remedies]),
                ("Waiting for you", [str(entry) for entry in self.waiting]),
                (why.title, why.lines()),
            ),
        )

    def _told(self, tell: Callable[[], str]) -> str:
        """A debugger or a log line that shows a session must not raise."""
        try:
            return tell()
        except Exception as error:
            logger.debug("the summary failed", exc_info=error)
            return f"<esper.Session {self._run.name!r}, step {self._run.step}: {error}>"

    # -- the parts of a step -------------------------------------------------------------------

    def _open(self) -> None:
        """At the first complete step the layers are known: watch them, and register the run."""
        if not self._layers.fix():
            return
        layers = self._layers.own
        if not self._detached:
            self._surgery.sampler = self._sampler(layers)
        if self._run.mode is not RunMode.OBSERVE:
            self._surgery.copies.search()  # now, so that no graft waits for it
        if not self._ranks.decides:
            return
        if self._diagnosis is not None:
            self._diagnosis.open(layers)
        if self._server is not None:
            self._server.start(
                layers,
                target_steps=self._setup.target_steps,
                model_parameters=self._model_parameters,
            )
        if self._local is not None:
            self._local.open(layers, self._model_parameters)

    def _idle_until(self) -> float:
        """The next step in which a part has something to do, but for its loss; 0: each step."""
        step, surgery, sampler = self._run.step, self._surgery, self._surgery.sampler
        if self._detached or not (self._layers.fixed and self._ranks.alone):
            return 0
        if self._diagnosis is None or self._remedies is None:
            return 0
        if surgery.changes.grafted or not isinstance(sampler, HealthSampler):
            return 0
        if 0 <= step - self._guard.acted_at <= AFTER_GUARD_STEPS:
            return 0
        return min(
            sampler.idle_until,
            self._diagnosis.idle_until,
            self._ledger.idle_until(step),
            self._remedies.idle_until,
            self._evaluations.idle_until,
            math.inf if surgery.states is None else surgery.states.idle_until,
            self._announcer.idle_until,
        )

    def _catch_up(self) -> None:
        """The parts take the losses of idle steps."""
        steps = self._idle.handed_over()
        if not steps:
            return
        self._try("ledger", partial(self._ledger.skip, len(steps)))
        self._try("good states", partial(self._take_idle, steps))

    def _take_idle(self, steps: list[IdleStep]) -> None:
        for step, _, loss, _ in steps:
            self._keep_good_states(loss, step)
        self._guard.take([loss for _, _, loss, _ in steps])
        if self._server is not None:
            self._server.send_idle(steps)

    def _keep_good_states(self, loss: float | None, step: int) -> None:
        """Every rank does it, from the loss that they share."""
        states = self._surgery.states
        if states is None or loss is None:
            return
        verdict = self._calm.observe(loss)
        healthy = verdict is None and self._calm.calm and not self._is_sick()
        states.on_step(step, healthy=healthy)

    def _is_sick(self) -> bool:
        """A serious finding is open; on several ranks only the loss, which all share, counts."""
        if self._diagnosis is None or not self._ranks.alone:
            return False
        serious = (Severity.SERIOUS, Severity.CRITICAL)
        return any(found.severity in serious for found in self._diagnosis.diagnosis.open)

    def _end_remedies(self) -> None:
        """No more proposals. What was applied stays in force, as grafts do."""
        if self._remedies is not None:
            self._remedies.close()
        if self._surgery.states is not None:
            self._surgery.states.close()

    def _sampler(self, layers: tuple[LayerInfo, ...]) -> HealthSampler | ShardedSampler | None:
        """On every rank where each holds a part of the model, otherwise on rank 0 alone."""
        around = self._setup.surroundings
        watch = LayerWatch(self._setup.model, self._compilation, self._fail_closed)
        if around.replicas is not None and around.replicas.layout is not None:
            return ShardedSampler(
                around.replicas.layout,
                FrameSum(around.replicas.background),
                around.optimizers,
                layers,
                watch=watch,
                leads=self._ranks.decides,
                wants_meeting=self._may_operate,
                pace=self._sampling,
                fail_closed=self._fail_closed,
            )
        if not self._ranks.decides:
            return None
        return HealthSampler(
            self._setup.model,
            around.optimizers,
            layers,
            watch=watch,
            watch_seconds=watch.take_seconds,
            pace=self._sampling,
            fail_closed=self._fail_closed,
        )

    def _meets_now(self) -> bool:
        """The ranks of a sharded model meet in this step; each of them knows it by itself."""
        changes, sampler = self._surgery.changes, self._surgery.sampler
        if self._setup.mode is not RunMode.OBSERVE or changes.adaptations or changes.remedies:
            return True
        return isinstance(sampler, ShardedSampler) and sampler.meets_next()

    def _take_part(self, loss: float | Tensor | None) -> None:
        """On a rank that does not decide: its part of the norms."""
        if self._surgery.sampler is not None:
            self._surgery.sampler.step(self._run.step, loss)

    def _may_operate(self) -> bool:
        """This step may change or evaluate the model, which the other ranks must know before."""
        commands = self._server is not None and self._server.has_commands
        decisions = self._local is not None and self._local.acts
        on_probation = self._surgery.changes.on_probation
        return commands or self._evaluations.due or decisions or on_probation

    def _decide(
        self,
        known: LossPoint | None,
        loss: float | Tensor | None,
        metrics: dict[str, float],
        *,
        busy: bool,
    ) -> None:
        """A step of the process that decides; nothing is changed or evaluated unless ``busy``."""
        at, value = known if known is not None else (self._run.step, None)
        if value is not None:
            self._try("guard", partial(self._guard.on_step, value, at))
        if self._server is not None and busy:
            self._try("commands", self._server.handle_commands)
        if busy:
            self._try("evaluation", partial(self._evaluations.on_step, metrics))
        before = self._latest_frame
        self._try("health", partial(self._look, loss, metrics))
        if self._diagnosis is not None and not self._detached:
            frame = self._latest_frame
            fresh = frame if frame is not before else None
            self._try("diagnosis", partial(self._diagnosis.on_step, value, fresh, metrics))

    def _look(self, loss: float | Tensor | None, metrics: dict[str, float]) -> None:
        sampler = self._surgery.sampler
        frame = None
        if sampler is not None:
            # On several ranks the loss is the mean of all; alone, the sampler reads this step's.
            others = {name: metrics[name] for name in metrics if name != "loss"}
            known = others if self._ranks.alone else metrics
            frame = sampler.step(self._run.step, loss, known)
        if isinstance(sampler, HealthSampler):
            self._measure_bottleneck(sampler)
        if frame is not None:
            frame = self._health.judge(frame)
            self._latest_frame = frame
            self._gradients.on_frame(frame)
            metrics = {**frame.metrics, **metrics}
        if self._server is not None:
            self._server.send_step(frame, metrics)
        if self._local is not None and frame is not None:
            self._local.on_frame(frame)

    def _measure_bottleneck(self, sampler: HealthSampler) -> None:
        """A graft is decided at a frame. On short steps frames are rare, and the finding is not."""
        lacked, self._lacks_capacity = (
            self._lacks_capacity,
            self._diagnosis is not None
            and any(found.rule.slug == CAPACITY for found in self._diagnosis.diagnosis.open),
        )
        if self._lacks_capacity and not lacked:
            sampler.measure_soon(self._run.step)

    @property
    def _stop_reason(self) -> str:
        return self._server.stop_reason if self._server is not None else self._follower.stop_reason

    def _take_metrics(self, loss: float | None) -> dict[str, float]:
        metrics, self._reported = self._reported, {}
        if loss is not None:
            metrics["loss"] = loss
        return metrics

    def _watch_compiler(self, metrics: dict[str, float]) -> None:
        recompiles = self._compiler.recompiles()
        if recompiles:
            metrics["recompiles"] = float(recompiles)
        if self._server is not None and self._layers.fixed:
            metrics.update(self._pauses_to_send())
        finding = self._compiler.finding()
        if finding is not None:
            self._findings.add(finding)

    def _pauses_to_send(self) -> dict[str, float]:
        """For the page of a decision: what a graft into compiled code costs; once per value."""
        pause = usual_pause() if any(layer.compiled for layer in self._layers.own) else None
        if pause is None or pause == self._pause_sent or math.isnan(pause.seconds):
            return {}
        self._pause_sent = pause
        return {"compile_ahead_s": pause.seconds, "compile_s": pause.unprepared_seconds}

    def _try(self, part: str, work: Callable[[], None]) -> None:
        """Esper's own errors never reach the training; a part that keeps failing is left out."""
        if self._failures.get(part, 0) >= MAX_PART_FAILURES:
            return
        try:
            work()
        except Exception as error:
            self._failures[part] = self._failures.get(part, 0) + 1
            if self._failures[part] == 1:
                logger.exception("Esper's %s failed; training goes on", part)
            if self._failures[part] == MAX_PART_FAILURES:
                self._fail_closed.switch_off(error, part=part, unmeasured=UNMEASURED[part])


def _parameters_of(model: nn.Module, surroundings: Surroundings) -> int:
    """Elements of all parameters, on all ranks together."""
    layout = surroundings.replicas.layout if surroundings.replicas is not None else None
    if layout is None:
        return sum(map(count_of, model.parameters()))
    return sum(part.shape.numel() for part in layout.parts())


def _identities(state: Any) -> list[Any] | None:
    """The part of a state that must be the same on all ranks; certificates are measured on each.

    None: it is not a state; the error is raised where it is read, on all ranks alike.
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
    """Why a run failed, as it is reported; empty where it did not fail."""
    return "" if error is None else str(error) or type(error).__name__


def patience_for(error: BaseException | None, seconds: float = 10.0) -> float:
    """How many seconds to wait for the server at the end; a person who interrupts waits for none.

    What is not sent then is in the journal, and the next session on this machine sends it.
    """
    return INTERRUPTED_SECONDS if isinstance(error, KeyboardInterrupt) else seconds


def _close_at_exit(session: Session, *, reports: bool) -> Callable[[], None]:
    """Ends the run when the script did not.

    Args:
        reports: the session talks to a server, so it stays until it has reported its end. Any
            other one is not kept in memory, and its model neither.
    """
    find: Callable[[], Session | None] = (lambda: session) if reports else weakref.ref(session)

    def close() -> None:
        found = find()
        if found is not None:
            with suppress(Exception):
                error = getattr(sys, "last_value", None)
                found.close(
                    reason=reason_of(error),
                    failed=error is not None,
                    timeout=patience_for(error, 3.0),
                )

    atexit.register(close)
    return close
