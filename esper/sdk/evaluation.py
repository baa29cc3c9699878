"""Calls the user's own ``evaluate()`` without leaving a trace in the training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from esper.grafting.evaluation_mode import undisturbed
from esper.reward import Look
from esper.reward.verdict import GAIN, LOSS
from esper.sdk.adaptation import Adaptation
from esper.sdk.ranks import Order, Ranks
from esper.sdk.run_state import RunState
from esper.sdk.surgery import Surgery

_SHARE = 50  # an evaluation may cost one part in so many of the time between two
_SHORTEST_GAP_STEPS = 100


class Evaluations:
    """Measures the held-out loss now and then, and how much each graft lowers it.

    Every value is the mean of all ranks.

    Args:
        evaluate: held-out loss, lower is better; on the same data at each call. It returns None
            while there is no such data. None where the script has no such function.
        watched: what looks at the model while it is called.
    """

    def __init__(
        self,
        evaluate: Callable[[], float | None] | None,
        surgery: Surgery,
        run: RunState,
        ranks: Ranks,
        watched: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._evaluate = evaluate
        self._watched = watched
        self._surgery = surgery
        self._run = run
        self._ranks = ranks
        self._next_step = _SHORTEST_GAP_STEPS
        self._next_time = 0.0
        self._asked: float | None = None  # was measured between two steps, and is not reported yet

    @property
    def due(self) -> bool:
        """It is time for a held-out loss again, by steps and by what it costs."""
        return (
            self._evaluate is not None
            and self._run.step >= self._next_step
            and time.monotonic() >= self._next_time
        )

    @property
    def idle_until(self) -> float:
        """The step from which on a held-out loss may be due; infinity where only time tells."""
        waits = self._evaluate is not None and self._run.step < self._next_step
        return self._next_step if waits else math.inf

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
            if not math.isnan(look.gain):
                metrics[GAIN + entry.uid] = look.gain
                metrics[LOSS + entry.uid] = look.loss
        if self.due:
            self._ranks.order(Order.evaluate())
            loss = self.due_loss()
            if not math.isnan(loss):
                metrics["eval_loss"] = loss

    def due_loss(self) -> float:
        """The held-out loss; the time to the next one counts from here."""
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
        started = time.monotonic()
        loss = self._loss()
        ended = time.monotonic()
        self._next_step = self._run.step + _SHORTEST_GAP_STEPS
        self._next_time = ended + _SHARE * (ended - started)
        return loss

    def _loss(self) -> float:
        """NaN where there is none."""
        assert self._evaluate is not None
        with undisturbed(self._surgery.model), self._watched():
            loss = self._evaluate()
        return math.nan if loss is None else float(loss)
