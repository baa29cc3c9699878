"""The steps of a session, and what each of its parts does in them.

step(loss)    idle        on short steps: nothing is due, so the loss is kept for a later step
              schedules   grafts that replace their layer do so a little more
              ledger      now and then: does the optimizer train all that it should
              guard       a diverging loss takes the youngest graft on probation out, at once
              commands    grafts and undos that are due; they happen only here
              evaluation  held-out loss; with each graft on and off
              health      a frame, when one is due
              telemetry   into a bounded queue; another thread sends it
              local loop  without a server: decide, graft, judge in this process
              shadow      a slice of the trial of a graft on a copy, within its share of the time
"""

from __future__ import annotations

import logging
import math
import time
from functools import partial

import torch
from torch import Tensor, nn

from esper.contracts import HealthFrame, RunMode, Severity
from esper.diagnosis import weights_digest
from esper.exceptions import ConfigurationError
from esper.fail_closed import is_the_scripts
from esper.grafting import LossGuard
from esper.health import HealthSampler
from esper.health.optimizer_steps import is_freed
from esper.health.sharded import ShardedSampler
from esper.policy.heuristic import CAPACITY
from esper.sdk.compiler_watch import CompilerWatch
from esper.sdk.compiling_ahead import PauseForecast, usual_pause
from esper.sdk.ending import RunStopped
from esper.sdk.findings import GradientWatch
from esper.sdk.idle_steps import IdleStep, IdleSteps
from esper.sdk.layer_health import LayerHealth
from esper.sdk.loss import LossReader
from esper.sdk.opening import open_run, parameters_of
from esper.sdk.parts import Parts
from esper.sdk.remedy_loop import AFTER_GUARD_STEPS
from esper.sdk.run_state import LossPoint
from esper.sdk.written_weights import OFTEN, WrittenWeights

logger = logging.getLogger("esper")


class Steps:
    """Takes the steps of one run.

    Attributes:
        reported: numbers of the script, which the next step takes.
        latest_frame: None before the first.
        detached: nothing is measured any more.
        closed: the run has ended.
        model_parameters: of the model as it was attached, on all ranks together.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._run = parts.run
        self.reported: dict[str, float] = {}
        self.latest_frame: HealthFrame | None = None
        self.detached = False
        self.closed = False
        self._reader = LossReader()
        diagnosis, queues = parts.diagnosis, parts.queues
        self._idle = IdleSteps(
            parts.run,
            diagnosis.is_usual if diagnosis is not None else lambda *_: False,
            queues.inbox if queues is not None else (),
        )
        self._calm = LossGuard()  # tells which states are good; not reset, as the guard's is
        self._gradients = GradientWatch(parts.findings, parts.setup.model)
        self._health = LayerHealth(parts.findings)
        self._compiler = CompilerWatch()
        self._pause_sent: PauseForecast | None = None
        self.model_parameters = parameters_of(parts.setup.model, parts.setup.surroundings)
        self._lacks_capacity = False
        self._written = parts.fail_closed.run(
            partial(WrittenWeights, parts.setup.model),
            part="written weights",
            unmeasured="whether the script puts other weights into the model",
        )
        self._rewinds = parts.run.rewinds

    def take(self, loss: float | Tensor | None) -> None:
        """One training step is over; see :meth:`esper.sdk.Session.step`."""
        known = self._reader.read(loss, self._run.step + 1)
        if known is not None and not self.reported and self._idle.take(*known):
            return
        if self.closed:
            raise ConfigurationError("this session is closed; attach again to go on")
        if self._weights_are_away():
            self._count(known)
            return
        has_gradients = torch.is_grad_enabled()
        try:
            # Some loops compute losses in inference mode, and log them there.
            with torch.inference_mode(False):
                self._whole_step(known, loss)
        finally:
            # An interrupt between torch.no_grad() and its block leaves the gradients off.
            torch.set_grad_enabled(has_gradients)

    def catch_up(self) -> None:
        """The parts take the losses of idle steps."""
        steps = self._idle.handed_over()
        if not steps:
            return
        contain = self._parts.failures.contain
        contain("ledger", partial(self._parts.ledger.skip, len(steps)))
        contain("good states", partial(self._take_idle, steps))

    def _weights_are_away(self) -> bool:
        """The script has freed their memory until the next forward pass; to read them would end the
        process. One tensor is looked at."""
        try:
            first = next(iter(self._parts.setup.model.parameters()), None)
        except Exception as error:  # the script's own method
            if is_the_scripts(error):
                raise
            return False
        if not self._parts.ranks.alone or type(first) is not nn.Parameter or first.is_meta:
            return False
        return first.layout is torch.strided and is_freed(first)

    def _count(self, known: LossPoint | None) -> None:
        self._run.step += 1
        if known is not None:
            self._run.losses.append(known)
        self._parts.fail_closed.switch_off(
            RuntimeError("the memory of the weights was freed when session.step was called"),
            part="measurement between steps",
            unmeasured="Nothing is measured in such steps: call session.step before.",
        )

    def _whole_step(self, known: LossPoint | None, loss: float | Tensor | None) -> None:
        self.catch_up()
        parts, run, contain = self._parts, self._run, self._parts.failures.contain
        run.step += 1
        at, value = known if known is not None else (run.step, None)
        value, busy = parts.ranks.meet_for_step(run.step, value, self._may_operate, self._meets_now)
        digests = parts.ranks.digests(run.step, partial(weights_digest, parts.setup.model))
        if parts.diagnosis is not None and digests:
            parts.diagnosis.rank_digests = digests
        contain("opening", self._learn_layers if parts.layers.fixed else self._open)
        contain("averages", parts.surgery.script_copies.find)
        # Before anything that may undo: a snapshot is taken after it, so an undo restores what the
        # next step would have used.
        contain("schedules", parts.surgery.on_step)
        if not self.detached:
            contain("ledger", partial(parts.ledger.on_step, run.step))
        if value is not None:
            run.losses.append((at, value))
        contain("written weights", self._look_for_written_weights)
        contain("good states", lambda: self._keep_good_states(value, run.step, self._is_sick()))
        metrics = self._take_metrics(value)
        contain("compiler", partial(self._watch_compiler, metrics))
        contain("compiling ahead", parts.ahead.on_step)
        self._decide_or_follow(None if value is None else (at, value), loss, metrics, busy=busy)
        if parts.remedies is not None and not self.detached:
            contain("remedies", partial(parts.remedies.on_step, parts.guard.acted_at))
        if parts.shadow is not None and not self.detached:
            contain("shadow", parts.shadow.on_step)
        parts.announcer.on_step()
        if self._stop_reason:
            raise RunStopped(self._stop_reason)
        if self._written is not None:
            contain("written weights", self._written.forget)  # what Esper wrote in this step
        self._idle.begin(self._idle_until())

    def _open(self) -> None:
        open_run(
            self._parts,
            model_parameters=self.model_parameters,
            measure=not self.detached,
            wants_meeting=self._may_operate,
        )

    def _learn_layers(self) -> None:
        if not self._parts.layers.learn():
            return
        layers = self._parts.layers.own
        if self._parts.diagnosis is not None:
            self._parts.diagnosis.open(layers)
        if self._parts.local is not None:
            self._parts.local.know(layers)

    # -- what a process decides, or another one has decided ------------------------------------

    def _decide_or_follow(
        self,
        point: LossPoint | None,
        loss: float | Tensor | None,
        metrics: dict[str, float],
        *,
        busy: bool,
    ) -> None:
        ranks = self._parts.ranks
        if ranks.alone:
            self._decide(point, loss, metrics, busy=busy)
        elif ranks.decides:
            with ranks.leading(busy, lambda: self._stop_reason):
                self._decide(point, loss, metrics, busy=busy)
        else:
            if busy:
                self._parts.follower.follow()
            self._parts.failures.contain("health", partial(self._take_part, loss))

    def _decide(
        self,
        point: LossPoint | None,
        loss: float | Tensor | None,
        metrics: dict[str, float],
        *,
        busy: bool,
    ) -> None:
        """A step of the process that decides; nothing is changed or evaluated unless ``busy``."""
        parts, contain = self._parts, self._parts.failures.contain
        if point is not None:
            at, value = point
            contain("guard", partial(parts.guard.on_step, value, at))
        if parts.server is not None and busy:
            contain("commands", parts.server.handle_commands)
        if busy:
            contain("evaluation", partial(parts.evaluations.on_step, metrics))
        before = self.latest_frame
        contain("health", partial(self._look, loss, metrics))
        if parts.diagnosis is not None and not self.detached:
            frame = self.latest_frame
            fresh = frame if frame is not before else None
            known = point[1] if point is not None else None
            contain("diagnosis", partial(parts.diagnosis.on_step, known, fresh, metrics))

    def _take_part(self, loss: float | Tensor | None) -> None:
        """On a rank that does not decide: its part of the norms."""
        if self._parts.surgery.sampler is not None:
            self._parts.surgery.sampler.step(self._run.step, loss)

    def _may_operate(self) -> bool:
        """This step may change or evaluate the model, which the other ranks must know before."""
        parts = self._parts
        commands = parts.server is not None and parts.server.has_commands
        decisions = parts.local is not None and parts.local.acts
        changes = parts.surgery.changes
        looks = changes.on_probation or bool(changes.due_for_look(self._run.step, self._run.policy))
        return commands or parts.evaluations.due or decisions or looks

    def _meets_now(self) -> bool:
        """The ranks of a sharded model meet in this step; each of them knows it by itself."""
        changes, sampler = self._parts.surgery.changes, self._parts.surgery.sampler
        observes = self._parts.setup.mode is RunMode.OBSERVE
        if not observes or changes.adaptations or changes.remedies:
            return True
        return isinstance(sampler, ShardedSampler) and sampler.meets_next()

    @property
    def _stop_reason(self) -> str:
        server = self._parts.server
        return server.stop_reason if server is not None else self._parts.follower.stop_reason

    # -- what is measured ----------------------------------------------------------------------

    def _look(self, loss: float | Tensor | None, metrics: dict[str, float]) -> None:
        parts, sampler, frame = self._parts, self._parts.surgery.sampler, None
        if sampler is not None:
            # On several ranks the loss is the mean of all; alone, the sampler reads this step's.
            others = {name: metrics[name] for name in metrics if name != "loss"}
            known = others if parts.ranks.alone else metrics
            frame = sampler.step(self._run.step, loss, known)
        if isinstance(sampler, HealthSampler):
            self._measure_bottleneck(sampler)
        if frame is not None:
            started = time.perf_counter()
            frame = self._health.judge(frame)
            self.latest_frame = frame
            self._gradients.on_frame(frame)
            parts.surgery.script_copies.on_frame(frame)
            metrics = {**frame.metrics, **metrics}
            if isinstance(sampler, HealthSampler):
                sampler.spend(time.perf_counter() - started)
        if parts.server is not None:
            parts.server.send_step(frame, metrics)
        if parts.local is not None and frame is not None:
            parts.local.on_frame(frame)

    def _measure_bottleneck(self, sampler: HealthSampler) -> None:
        """A graft is decided at a frame. On short steps frames are rare, and the finding is not."""
        diagnosis = self._parts.diagnosis
        lacked, self._lacks_capacity = (
            self._lacks_capacity,
            diagnosis is not None
            and any(found.rule.slug == CAPACITY for found in diagnosis.diagnosis.open),
        )
        if self._lacks_capacity and not lacked:
            sampler.measure_soon(self._run.step)

    def _take_metrics(self, loss: float | None) -> dict[str, float]:
        metrics, self.reported = self.reported, {}
        if loss is not None:
            metrics["loss"] = loss
        return metrics

    def _watch_compiler(self, metrics: dict[str, float]) -> None:
        recompiles = self._compiler.recompiles()
        if recompiles:
            metrics["recompiles"] = float(recompiles)
        if self._parts.server is not None and self._parts.layers.fixed:
            metrics.update(self._pauses_to_send())
        finding = self._compiler.finding()
        if finding is not None:
            self._parts.findings.add(finding)

    def _pauses_to_send(self) -> dict[str, float]:
        """For the page of a decision: what a graft into compiled code costs; once per value."""
        compiled = any(layer.compiled for layer in self._parts.layers.own)
        pause = usual_pause() if compiled else None
        if pause is None or pause == self._pause_sent or math.isnan(pause.seconds):
            return {}
        self._pause_sent = pause
        return {"compile_ahead_s": pause.seconds, "compile_s": pause.unprepared_seconds}

    # -- weights of the script, good states, and steps in which nothing is due ------------------

    def _look_for_written_weights(self) -> None:
        """Where the script put other weights in, the run begins anew with them."""
        parts, run, written = self._parts, self._run, self._written
        if written is None or parts.diagnosis is None or not parts.ranks.alone:
            return
        if run.rewinds != self._rewinds:  # a person went back, between two steps
            self._rewinds = run.rewinds
            written.forget()
        last = written.look(run.step, run.losses)
        parts.diagnosis.script_writes = written.times >= OFTEN
        if last < 0:
            return
        logger.info(
            "the script put other weights into the model after step %d: no earlier state is "
            "restored, and the loss has a new level",
            last,
        )
        run.begin_anew(last)
        self._rewinds = run.rewinds
        self._calm.reset()
        parts.diagnosis.forget_readings()
        if parts.surgery.states is not None:
            parts.surgery.states.begin_anew()
            parts.surgery.states.marked = None

    def _keep_good_states(self, loss: float | None, step: int, is_sick: bool) -> None:
        """Every rank does it, from the loss that they share."""
        states = self._parts.surgery.states
        if states is None or loss is None:
            return
        verdict = self._calm.observe(loss)
        healthy = verdict is None and self._calm.calm and not is_sick
        states.on_step(step, healthy=healthy)

    def _is_sick(self) -> bool:
        """A serious finding is open; on several ranks only the loss, which all share, counts."""
        diagnosis = self._parts.diagnosis
        if diagnosis is None or not self._parts.ranks.alone:
            return False
        serious = (Severity.SERIOUS, Severity.CRITICAL)
        return any(found.severity in serious for found in diagnosis.diagnosis.open)

    def _take_idle(self, steps: list[IdleStep]) -> None:
        if self._parts.surgery.states is not None:
            is_sick = self._is_sick()
            for step, _, loss, _ in steps:
                self._keep_good_states(loss, step, is_sick)
        self._parts.guard.take([loss for _, _, loss, _ in steps])
        if self._parts.server is not None:
            self._parts.server.send_idle(steps)

    def _idle_until(self) -> float:
        """The next step in which a part has something to do, but for its loss; 0: each step."""
        parts, step = self._parts, self._run.step
        surgery, sampler = parts.surgery, parts.surgery.sampler
        if parts.shadow is not None and parts.shadow.busy:
            return 0
        if self.detached or not (parts.layers.fixed and parts.ranks.alone):
            return 0
        if parts.diagnosis is None or parts.remedies is None:
            return 0
        if surgery.changes.grafted or not isinstance(sampler, HealthSampler):
            return 0
        if surgery.script_copies.is_watched:
            return 0
        if 0 <= step - parts.guard.acted_at <= AFTER_GUARD_STEPS:
            return 0
        return min(
            sampler.idle_until,
            parts.diagnosis.idle_until,
            parts.ledger.idle_until(step),
            parts.remedies.idle_until,
            parts.evaluations.idle_until,
            math.inf if surgery.states is None else surgery.states.idle_until,
            parts.announcer.idle_until,
        )
