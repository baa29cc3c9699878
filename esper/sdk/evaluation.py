"""Calls the user's own ``evaluate()`` without leaving a trace in the training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from esper.grafting.layers.evaluation_mode import undisturbed
from esper.reward import Look
from esper.reward.verdict import GAIN, LOSS
from esper.sdk.adaptation import Adaptation
from esper.sdk.changes import pace_looks
from esper.sdk.evaluation_pace import EvaluationPace, Recorded
from esper.sdk.ranks import Order, Ranks
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery


class Evaluations:
    """Measures the held-out loss now and then, and how much each graft lowers it.

    Every value is the mean of all ranks.

    Args:
        evaluate: held-out loss, lower is better; on the same data at each call. It returns None
            while there is no such data. None where the script has no such function.
        watched: what looks at the model while it is called.
        fixed: periods that a person fixed; by default they follow from what an evaluation costs.
        clock: seconds, monotonic.

    Attributes:
        pace: at which steps it is due.
    """

    def __init__(
        self,
        evaluate: Callable[[], float | None] | None,
        surgery: Surgery,
        run: RunState,
        ranks: Ranks,
        watched: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        fixed: Recorded | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._evaluate = evaluate
        self._watched = watched
        self._surgery = surgery
        self._run = run
        self._ranks = ranks
        self.pace = EvaluationPace(fixed)
        self._clock = clock
        self._next_step = self.pace.after(0)
        self._since = (0, 0.0)  # the step of the evaluation before, and when that was over
        self._asked: float | None = None  # was measured between two steps, and is not reported yet

    @property
    def due(self) -> bool:
        """A held-out loss is to be measured at this step."""
        return self._evaluate is not None and self._run.step >= self._next_step

    @property
    def idle_until(self) -> float:
        """The step at which the next held-out loss is due."""
        return self._next_step if self._evaluate is not None else math.inf

    def begin(self) -> None:
        """The process has made its first step: what comes before tells nothing of the others."""
        self._next_step = self.pace.after(self._run.step - 1)
        self._since = (self._run.step, self._clock())

    def on_step(self, metrics: dict[str, float]) -> None:
        """On the process that decides: measure what is due, into ``metrics``."""
        if self._evaluate is None:
            return
        asked, self._asked = self._asked, None
        if asked is not None:
            metrics["eval_loss"] = asked
        for entry in self._surgery.changes.due_for_look(self._run.step, self._run.policy):
            self._ranks.order(Order.evaluate(entry.uid))
            look = self.look(entry)
            pace_looks(entry, self._run.step, self._run.policy)
            if not math.isnan(look.gain):
                metrics[GAIN + entry.uid] = look.gain
                metrics[LOSS + entry.uid] = look.loss
        if self.due:
            self._ranks.order(Order.evaluate())
            loss = self.due_loss()
            if not math.isnan(loss):
                metrics["eval_loss"] = loss

    def due_loss(self) -> float:
        """The held-out loss, whose cost counts for the pace."""
        loss = self._ranks.mean(self._timed_loss)
        if self._surgery.states is not None:
            self._surgery.states.note_held_out(self._run.step, loss)
        return loss

    @property
    def on_request(self) -> Callable[[], float] | None:
        """Measures the held-out loss now, for a person; None: the script has no such function."""
        return None if self._evaluate is None else self._measure_now

    def _measure_now(self) -> float:
        loss = self.due_loss()
        self._asked = None if math.isnan(loss) else loss
        return loss

    def look(self, adaptation: Adaptation) -> Look:
        """The held-out loss with the graft and without it, now."""
        started, off = time.perf_counter(), math.nan

        def gain() -> float:
            nonlocal off
            on = self._loss()
            with self._surgery.without(adaptation):
                off = self._loss()
            return off - on

        found = Look(self._run.step, self._ranks.mean(gain), self._ranks.mean(lambda: off))
        adaptation.looks.append(found)
        adaptation.look_seconds += time.perf_counter() - started
        return found

    def take_no_part(self, *, look: bool) -> None:
        """On a rank that cannot measure what rank 0 orders: its numbers are unknown.

        Args:
            look: a :meth:`look` is ordered, which has two numbers.
        """
        for _ in range(2 if look else 1):
            self._ranks.mean(lambda: math.nan)

    def _timed_loss(self) -> float:
        step, (last_step, last_ended) = self._run.step, self._since
        started = self._clock()
        loss = self._loss()
        ended = self._clock()
        if step > last_step:
            # The mean counts pauses of the script and what other programs take at times, so it
            # differs from run to run; it is for runs that nothing samples.
            typical = self._surgery.sampler.typical_step if self._surgery.sampler else math.nan
            mean = (started - last_ended) / (step - last_step)
            self.pace.add(step, ended - started, mean if math.isnan(typical) else typical)
        self._next_step = self.pace.after(step)
        self._since = (step, ended)
        return loss

    def _loss(self) -> float:
        """NaN where there is none."""
        assert self._evaluate is not None
        with undisturbed(self._surgery.model), self._watched():
            loss = self._evaluate()
        return math.nan if loss is None else float(loss)
