"""Collects the facts of a run that no health frame has, at a paced cost.

each step      the mode of modules at the optimizer's step; what a backward pass starts from, for
               the first updates
planned steps  gradients, one forward pass; the plan is fixed by steps, and grows with the cost
               that was measured at fixed steps, so that a run can be repeated
once           the parameters before the first update; where numbers are not finite
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esper.diagnosis.facts import Broken, Gradients, ModelPass, Modes, TensorFacts, Zeroing
from esper.diagnosis.forward_probe import ForwardProbe
from esper.diagnosis.gradient_probe import GradientProbe
from esper.diagnosis.modes import BATCH_NORM, ModesProbe, drop_probability
from esper.diagnosis.plan import Plan, undisturbed_time
from esper.diagnosis.weights import EQUAL_ROWS, read_tensors, same_modules, still_symmetric
from esper.diagnosis.zeroing import ZeroingProbe
from esper.fail_closed import FailClosed
from esper.grafting.compiled import Compilation, anything_was_compiled
from esper.grafting.guard import gradient_values
from esper.grafting.layers.graph import layer_modules
from esper.grafting.optimizers import parameters_of, unwrap_optimizer
from esper.health.transfers import HostTransfer, is_late
from esper.health.updates import Part, takes_hooks

KEPT = 16  # readings
WATCHED_EVALUATIONS = 2
PART = "diagnosis"
UNMEASURED = "Some rules of the diagnosis are not checked."


class Recorder:
    """Measures one model in its training.

    Args:
        model: as it trains.
        optimizers: those that train it.
        fail_closed: where a part is reported that failed.
        reads: False for a model that is spread over ranks, of which this one sees a part: nothing
            is read from it, and the rules that need it do not know.
        cost_clock: seconds, monotonic, of what a look takes. By default those of this thread alone:
            where other programs take the processor during a look, the next ones would come
            thousands of steps later.
        step_clock: seconds, monotonic, of what a step takes, which may be to wait for data, but not
            for a processor.

    Attributes:
        step: steps of the session so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        fail_closed: FailClosed,
        *,
        reads: bool = True,
        cost_clock: Callable[[], float] = time.thread_time,
        step_clock: Callable[[], float] = undisturbed_time,
        compilation: Compilation | None = None,
    ) -> None:
        self._model = model
        self._reads = reads
        self._optimizers = tuple(map(unwrap_optimizer, optimizers))
        self._cost_clock = cost_clock
        self._step_clock = step_clock
        self._closed = partial(fail_closed.wrap, part=PART, unmeasured=UNMEASURED)
        self.plan = Plan()
        self.passes: list[ModelPass] = []  # the first one, and the newest
        self.gradients: deque[Gradients] = deque(maxlen=KEPT)
        self.tensors: tuple[TensorFacts, ...] = ()
        if reads and not any(optimizer.state for optimizer in self._optimizers):
            self.tensors = self._closed(read_tensors)(model) or ()
        self.duplicates = self._closed(same_modules)(model) or ()
        self._forward = ForwardProbe(model, self._closed, compilation)
        self._gradient = GradientProbe(model)
        self._zeroing = ZeroingProbe(self._closed)
        self._modes = ModesProbe(model)
        modules = list(model.named_modules())
        self._dropouts = [
            (name, module) for name, module in modules if drop_probability(module) > 0
        ]
        self._batch_norms = [(n, m) for n, m in modules if isinstance(m, BATCH_NORM)]
        self.step = 0
        self._due = True
        self._evaluations = 0
        self._waiting: (
            tuple[Callable[[], ModelPass] | None, Callable[[], Gradients] | None] | None
        ) = None  # makes what was measured, once its numbers have arrived
        self._seconds = 0.0  # of the present reading, without the rules
        self._first_time = math.nan
        before, after = self._closed(self._before_update), self._closed(self._after_update)
        with_hooks = filter(takes_hooks, self._optimizers if reads else ())
        self._parts = [Part(optimizer, before=before, after=after) for optimizer in with_hooks]
        self._updates_read = 0
        self._rate = math.nan  # the highest of the updates since the last reading
        self._arm()
        if reads:
            self._closed(self._forward.arm)()

    @property
    def zeroing(self) -> Zeroing:
        return self._zeroing.facts()

    @property
    def modes(self) -> Modes:
        return self._modes.facts

    @property
    def dropouts(self) -> tuple[tuple[str, float], ...]:
        """(layer, probability) of each one that is on."""
        found = ((name, module, drop_probability(module)) for name, module in self._dropouts)
        return tuple((name, p) for name, module, p in found if module.training and p > 0)

    @property
    def batch_norms(self) -> tuple[tuple[str, float], ...]:
        """(layer, momentum) of each one that keeps statistics in training mode."""
        return tuple(
            (name, float(module.momentum))
            for name, module in self._batch_norms
            if module.training and module.track_running_stats and module.momentum is not None
        )

    @property
    def without_statistics(self) -> tuple[str, ...]:
        """Batch norms that are in evaluation mode and have seen no batch."""
        return self._modes.without_statistics

    def on_step(self, step: int) -> bool:
        """A step of the session is over; True where the run was measured in it."""
        started = self._cost_clock()
        if math.isnan(self._first_time):
            self._first_time = self._step_clock()
        self.step = step
        measured = self._finish()  # the step before, where its numbers came later
        due, self._due = self._due, False
        if due:
            measured |= self._take(step)
        if due or measured:
            self._seconds += self._cost_clock() - started
        if self.plan.is_due(step + 1):
            self._due = True
            if self._reads and self.plan.reads_forward(step + 1):
                self._closed(self._forward.arm)()
        self._arm()
        return measured

    @property
    def idle_until(self) -> int:
        """The next step for which :meth:`on_step` must be called; those before may be left out."""
        if self._due or self._waiting is not None or self._modes.facts.updates:
            return 0
        return self.plan.next_due(self.step + 1) - 1

    @property
    def start_is_known(self) -> bool:
        """:attr:`zeroing` does not change any more."""
        return self._zeroing.done

    def _arm(self) -> None:
        armed = self._due or self._modes.counts or not self._zeroing.done
        for part in self._parts:
            part.arm(armed)

    def spend(self, seconds: float) -> None:
        """What the rules have cost in a measured step."""
        self.plan.add(seconds + self._seconds)
        self._seconds = 0.0
        if self.step > 1 and self.plan.adapts_at(self.step):
            typical = (self._step_clock() - self._first_time) / (self.step - 1)
            self.plan.adapt(self.step, typical)

    @property
    def symmetric(self) -> tuple[str, ...]:
        """Tensors that started like others and still are; see :func:`still_symmetric`."""
        suspects = [t for t in self.tensors if t.twin or t.equal_rows >= EQUAL_ROWS]
        if not suspects:  # the rest walks through the model
            return ()
        if any(t.twin for t in suspects):
            # A target or an average starts as a copy, and no optimizer trains it.
            held = {id(p) for optimizer in self._optimizers for p in parameters_of(optimizer)}
            own = {name for name, p in self._model.named_parameters() if id(p) in held}
            suspects = [t for t in suspects if not t.twin or {t.name, t.twin} <= own]
        with torch.no_grad():
            return still_symmetric(self._model, suspects)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the first evaluations show whether they run the model in training mode."""
        self._evaluations += 1
        # A hook would make torch compile the model once more.
        if self._evaluations > WATCHED_EVALUATIONS or anything_was_compiled():
            yield
            return
        watching = self._modes.evaluating(self._closed)
        try:
            yield
        finally:
            for handle in watching:
                handle.remove()

    def broken(self) -> Broken:
        """Where weights and gradients are not finite; a full pass over both."""
        weights, gradients = [], []
        zero: list[bool] = []
        for name, module in layer_modules(self._model).items():
            own = list(module.parameters())
            if not _finite(p.detach() for p in own):
                weights.append(name)
            found = [g for p in own if (g := gradient_values(p)) is not None]
            if not _finite(found):
                gradients.append(name)
            zero += [not bool(gradient.any()) for gradient in found]
        return Broken(tuple(weights), tuple(gradients), nothing_counts=bool(zero) and all(zero))

    def look_at_next(self) -> None:
        """The next step is measured, whatever the plan says."""
        self._due = True
        if self._reads:
            self._closed(self._forward.arm)()
        self._arm()

    def forget_readings(self) -> None:
        """The model was changed: what was read before says nothing about it."""
        self.gradients.clear()
        self._gradient.forget()

    def close(self) -> None:
        """Removes all hooks."""
        self._forward.close()
        self._zeroing.close()
        for part in self._parts:
            part.remove()

    def _take(self, step: int) -> bool:
        """True where all is known now; on a GPU the numbers arrive with the next step."""
        transfer = HostTransfer()
        seen = self._forward.collect(step, transfer)
        taken = sum(part.taken for part in self._parts)
        updates = taken - self._updates_read
        read = self._gradient.collect(step, transfer, rate=self._rate, updates=updates)
        if read is not None:
            self._updates_read, self._rate = taken, math.nan
        transfer.start()
        self._waiting = seen, read
        return not transfer.is_late and self._finish()

    def _finish(self) -> bool:
        """True where there was a step to finish."""
        if self._waiting is None:
            return False
        (seen, read), self._waiting = self._waiting, None
        if seen is not None:
            self.passes = [*self.passes[:1], *self.passes[1:][-KEPT:], seen()]
        if read is not None:
            self.gradients.append(read())
        return True

    def _before_update(self, optimizer: torch.optim.Optimizer) -> None:
        self._zeroing.on_update_begins(optimizer)
        # Read here: after the update a scheduler has set the rate of the next one.
        self._rate = _higher(self._rate, highest_rate([optimizer]))
        if self._due:
            started = self._cost_clock()
            self._gradient.remember(optimizer)
            self._seconds += self._cost_clock() - started

    def _after_update(self, optimizer: torch.optim.Optimizer) -> None:
        started = self._cost_clock()
        self._modes.on_update(self.step + 1)
        self._zeroing.on_update(optimizer)
        if self._due:
            self._gradient.read(optimizer)
            self._seconds += self._cost_clock() - started


def highest_rate(optimizers: Iterable[torch.optim.Optimizer]) -> float:
    """The largest learning rate; one that is a tensor on a GPU is not read.

    Optimizers of ``schedulefree`` warm up by themselves, from zero; the rate of their last step is
    in ``scheduled_lr``.
    """
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    rates = (group.get("scheduled_lr", group.get("lr")) for group in groups)
    known = (r for r in rates if r is not None and not (isinstance(r, Tensor) and is_late(r)))
    return max(map(float, known), default=math.nan)


def _higher(one: float, other: float) -> float:
    """The higher one that is known."""
    return other if math.isnan(one) else one if math.isnan(other) else max(one, other)


def _finite(tensors: Iterable[Tensor]) -> bool:
    found = [t for t in tensors if t.is_floating_point() and not t.is_meta and t.numel()]
    return all(bool(tensor.isfinite().all()) for tensor in found)
