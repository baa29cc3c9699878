"""Drives the diagnosis of one run: what is measured goes to the rules, their findings to people."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import nn

from esper.contracts import Finding, HealthFrame, LayerInfo, Severity, ViolationRule
from esper.diagnosis import Change, Diagnosed, Diagnosis, Observation, Recorder
from esper.diagnosis.facts import Broken
from esper.diagnosis.recorder import highest_rate
from esper.diagnosis.updates import (
    EXCESSIVE,
    estimates_rate,
    follows_gradient,
    may_warm_up,
    overshoot,
    searches,
    sound_update,
)
from esper.fail_closed import FailClosed
from esper.grafting import Surroundings
from esper.grafting.compiled import Compilation
from esper.grafting.layers.graph import count_of
from esper.health.features import MAX_FRAMES
from esper.remedies import Remedy
from esper.sdk.findings import Findings
from esper.sdk.run_state import LOSSES_KEPT, LossPoint, RunState

HELD_OUT = ("eval_loss", "val_loss", "valid_loss", "validation_loss")
HELD_OUT_KEPT = 500
RATES_KEPT = 4_000
LATEST = 256  # losses for the rules that are checked in each step
JUMP = 3.0  # times the recent loss: worth checks outside the plan
JUMP_CHECKS = 6  # steps in a row
CLOSELY_EVERY = 20  # periods of the plan between two jumps that are looked at closely
BROKEN_LOOKS = 10  # steps in a row; a loss may be NaN for long, and the weights finite
WATCHED_STEPS = 200  # of the session, in which the first updates are counted


class DiagnosisWatch:
    """The findings of the rules, for one run.

    Args:
        findings: where they are reported.

    Attributes:
        optimizers: those that train the model.
        rank_digests: of the weights of all ranks, when they were compared last.
        script_writes: the script writes weights by itself, again and again.
    """

    def __init__(
        self,
        model: nn.Module,
        surroundings: Surroundings,
        run: RunState,
        findings: Findings,
        fail_closed: FailClosed,
        compilation: Compilation | None = None,
    ) -> None:
        self._model = model
        self._run = run
        self._findings = findings
        ranks = surroundings.replicas
        whole = ranks is None or ranks.layout is None
        self.recorder = Recorder(
            model, surroundings.optimizers, fail_closed, compilation=compilation, reads=whole
        )
        self.rank_digests: tuple[float, ...] = ()
        self.script_writes = False
        self.diagnosis = Diagnosis()
        self.optimizers = surroundings.optimizers
        self._layers: tuple[LayerInfo, ...] = ()
        self._frames: deque[HealthFrame] = deque(maxlen=MAX_FRAMES)
        self._held_out: deque[tuple[int, float]] = deque(maxlen=HELD_OUT_KEPT)
        self._rates: deque[tuple[int, float]] = deque(maxlen=RATES_KEPT)
        self._recent = math.nan  # slow mean of the finite losses
        self._checked_until = -1
        self._updates_seen = 0
        self._anew_since = 0  # the step in which the weights were put in
        self._broken: Broken | None = None  # known while the loss is not finite
        self._broken_since = -1

    def open(self, layers: tuple[LayerInfo, ...]) -> None:
        """The first step is over, so the layers are known."""
        self._layers = tuple(layer for layer in layers if layer.in_shape)

    def on_step(
        self, loss: float | None, frame: HealthFrame | None, metrics: Mapping[str, float]
    ) -> None:
        """A step of the session is over."""
        if frame is not None:
            self._frames.append(frame)
        held_out = next((metrics[name] for name in HELD_OUT if name in metrics), None)
        if held_out is not None:
            self._run.held_out = float(held_out)
            self._held_out.append((self._run.step, float(held_out)))
        planned = self.recorder.on_step(self._run.step)
        urgent = self._is_urgent(loss)
        if planned or urgent:
            self._read_rate(always=planned)
        if planned or held_out is not None or urgent:
            started = time.thread_time()  # as the recorder's clock
            self._check(every_step_only=not planned and held_out is None)
            if planned:
                if self.diagnosis.is_unsure:
                    self.recorder.plan.look_again(self._run.step)
                self.recorder.spend(time.thread_time() - started)

    @property
    def idle_until(self) -> int:
        """The next step for which :meth:`on_step` must be called, unless :meth:`is_usual` says no.

        A step in between has no frame and no metrics but its loss.
        """
        young = self._run.step <= WATCHED_STEPS and not self.recorder.start_is_known
        if young or self._broken is not None or self._is_hard():
            return 0
        return 0 if self._run.step < self._checked_until else self.recorder.idle_until

    def is_usual(self, loss: float, step: int) -> bool:
        """Takes the loss of a step without :meth:`on_step`; False where that must be called."""
        recent = self._recent
        if self.recorder.modes.updates or not -math.inf < loss <= JUMP * abs(recent):
            return False
        self.recorder.step = step
        self._recent = 0.9 * recent + 0.1 * loss
        return True

    @property
    def update_excess(self) -> float:
        """How much larger updates are than at a sound rate; NaN unknown.

        The first one that is far too large counts: it damages the weights, and later gradients are
        of damaged ones. Readings from before the model was changed do not count.
        """
        largest = math.nan
        for excess in self._excesses():
            if excess > EXCESSIVE:
                return excess
            largest = excess if math.isnan(largest) else max(largest, excess)
        return largest

    @property
    def newest_excess(self) -> float:
        """The same of the newest update, so of the weights as they are now; NaN unknown."""
        known = [excess for excess in self._excesses() if not math.isnan(excess)]
        return known[-1] if known else math.nan

    def _excesses(self) -> Iterator[float]:
        for reading in self.recorder.gradients:
            sound = sound_update(self.optimizers, reading.step - self._anew_since)
            yield reading.change / sound

    @property
    def first_update(self) -> float:
        """How far the first update would move the weights at the present rate; NaN unknown.

        That of an adaptive optimizer does not depend on the gradient's size and noise, so it tells
        more of the rate than later ones.
        """
        known = [reading for reading in self.recorder.gradients if reading.rate > 0]
        if not known or known[0].step - self._anew_since != 1:
            return math.nan
        now = known[-1].rate / known[0].rate
        return known[0].change * now / overshoot(self.optimizers, 1)

    @property
    def guessing_loss(self) -> float:
        """Of equal chances for all classes; NaN where the loss is another, or is not known."""
        passes = self.recorder.passes
        return passes[0].guessing_loss if passes else math.nan

    def look_closely(self) -> None:
        """The run was changed, or its loss jumped: it is measured as often as at its start."""
        self.recorder.plan.since = self._run.step

    def follow(self, remedy: Remedy) -> None:
        """It was applied: the run is measured as often as at its start.

        Where it has changed the weights, what was read before says nothing about the run now.
        """
        self.look_closely()
        if remedy.changes_weights:
            self.forget_readings()

    def forget_readings(self) -> None:
        """The weights are others now."""
        self.recorder.forget_readings()
        self._anew_since = self._run.step
        self._frames.clear()
        kept = [point for point in self._held_out if self._run.led_to_its_weights(point[0])]
        self._held_out = deque(kept, maxlen=HELD_OUT_KEPT)

    def close(self) -> None:
        self.recorder.close()

    def _read_rate(self, *, always: bool) -> None:
        """Of an urgent step only where it has changed: the plan's steps show how it moves."""
        rate = highest_rate(self.optimizers)
        if always or (self._rates and rate != self._rates[-1][1]):
            self._rates.append((self._run.step, rate))

    def _is_urgent(self, loss: float | None) -> bool:
        """A hard fault may have begun or ended in this step."""
        updates = self._updates_seen
        if self._run.step <= WATCHED_STEPS:
            updates = len(self.recorder.zeroing.carried)
        changed, self._updates_seen = updates != self._updates_seen, updates
        modes = self.recorder.modes
        changed |= modes.was_training and modes.updates == 2  # the mode was left behind
        if loss is None:
            return changed
        if not math.isfinite(loss):
            self._look_at_broken()
            return True
        self._broken = None
        if loss > JUMP * abs(self._recent):
            self._checked_until = self._run.step + JUMP_CHECKS
            plan = self.recorder.plan
            if self._run.step - plan.since >= CLOSELY_EVERY * plan.period:
                self.look_closely()  # on long steps the next planned look may be far away
        known = not math.isnan(self._recent)
        self._recent = 0.9 * self._recent + 0.1 * loss if known else loss
        return changed or self._is_hard() or self._run.step <= self._checked_until

    def _look_at_broken(self) -> None:
        """Where the loss is not finite: until the weights are not either, or stay so."""
        if self._broken is None:
            self._broken_since = self._run.step
            self.recorder.look_at_next()  # whether the data is at fault
        elif self._broken.weights or self._run.step > self._broken_since + BROKEN_LOOKS:
            return
        self._broken = self.recorder.broken()

    def _is_hard(self) -> bool:
        """A hard fault is open, whose end is looked for in each step."""
        critical = [d for d in self.diagnosis.open if d.rule.severity is Severity.CRITICAL]
        return any(diagnosed.rule.every_step for diagnosed in critical)

    def _check(self, *, every_step_only: bool) -> None:
        observation = self._observe(LATEST if every_step_only else LOSSES_KEPT)
        for change, diagnosed in self.diagnosis.check(observation, every_step_only=every_step_only):
            self._report(change, diagnosed)

    def _report(self, change: Change, diagnosed: Diagnosed) -> None:
        if change is Change.OPENED and diagnosed.evidence.passes:
            self.recorder.look_at_next()  # nothing is done before it is known
        if diagnosed.rule.by_ledger:
            return  # the ledger reports it tensor by tensor, and from the start
        self._findings.report(change, diagnosed.finding())

    def _observe(self, kept: int) -> Observation:
        run, recorder = self._run, self.recorder
        losses_T2 = _as_table(run.losses_of_its_weights(kept))
        parameters = list(self._model.named_parameters())
        trainable = {name: p for name, p in parameters if p.requires_grad}
        learning = {name.rpartition(".")[0] for name in trainable}
        frozen = {name: p for name, p in parameters if not p.requires_grad}
        still = dict.fromkeys(name.rpartition(".")[0] for name in frozen)
        return Observation(
            step=run.step,
            layers=tuple(layer.name for layer in self._layers),
            infos=self._layers,
            frames=tuple(self._frames),
            loss_steps=losses_T2[:, 0].astype(np.int64),
            losses=losses_T2[:, 1].copy(),
            first_losses=np.array(run.first_losses(), dtype=np.float64),
            rewinds=run.rewinds,
            other_data_since=run.other_data_since,
            held_out=tuple(self._held_out),
            rates=tuple(self._rates),
            ledger=self._ledger(),
            tensors=recorder.tensors,
            symmetric=recorder.symmetric,
            frozen=sum(map(count_of, frozen.values())),
            trainable=sum(map(count_of, trainable.values())),
            trainable_matrices=sum(p.ndim >= 2 for p in trainable.values()),
            frozen_layers=tuple(layer for layer in still if layer not in learning),
            passes=tuple(recorder.passes),
            gradients=tuple(recorder.gradients),
            zeroing=recorder.zeroing,
            modes=recorder.modes,
            dropouts=recorder.dropouts,
            batch_norms=recorder.batch_norms,
            without_statistics=recorder.without_statistics,
            rank_digests=self.rank_digests,
            script_writes=self.script_writes,
            optimizers=len(tuple(self.optimizers)),
            searches=searches(self.optimizers),
            estimates_rate=estimates_rate(self.optimizers),
            warms_up=may_warm_up(self.optimizers),
            overshoot=self._overshoot(),
            update_excess=self.update_excess,
            follows_gradient=follows_gradient(self.optimizers),
            duplicates=recorder.duplicates,
            broken=self._broken or Broken(),
        )

    def _overshoot(self) -> float:
        gradients = self.recorder.gradients
        at = gradients[-1].step if gradients else self._run.step
        return overshoot(self.optimizers, at - self._anew_since)

    def _ledger(self) -> tuple[Finding, ...]:
        found = self._findings.all()
        return tuple(f for f in found if f.rule == ViolationRule.OPTIMIZER_LEDGER)


def _as_table(losses: list[LossPoint]) -> NDArray[np.float64]:
    """float64 [T, 2]: step and loss. Steps are exact in float64, and one pass is the cheapest."""
    numbers = chain.from_iterable(losses)
    return np.fromiter(numbers, dtype=np.float64, count=2 * len(losses)).reshape(-1, 2)
