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
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.diagnosis.forward_probe import ForwardProbe
from esper.diagnosis.gradient_probe import GradientProbe
from esper.diagnosis.observation import (
    Broken,
    Gradients,
    ModelPass,
    Modes,
    TensorFacts,
    Zeroing,
)
from esper.diagnosis.weights import EQUAL_ROWS, read_tensors, same_modules, still_symmetric
from esper.fail_closed import FailClosed
from esper.grafting.compiled import Compilation, anything_was_compiled
from esper.grafting.graph import layer_modules
from esper.grafting.guard import gradient_values
from esper.grafting.hooks import PassingHook
from esper.grafting.optimizers import parameters_of, unwrap_optimizer
from esper.health.optimizer_steps import has_numbers
from esper.health.transfers import HostCopy, HostTransfer, copy_to_host, is_late
from esper.health.updates import Part, takes_hooks

FIRST_STEPS = (1, 2, 3, 5, 10, 20, 30, 40, 50)
FORWARD_STEPS = (1, 10, 30, 50)
SURE_STEPS = (100, 200, 400, 600, 800)  # however little a step takes: a short run is looked at too
PERIOD = 50  # shortest, after the first steps
FORWARD_EVERY = 4  # planned steps
MEASURED_AT = (50, 500, 5_000)  # where the period is set from the cost so far
BUDGET = 0.0025  # of the time of a step
LEAST_SECONDS_PER_STEP = 10e-6  # on short steps, where the rules cost more than that share
LARGEST_BUDGET = 0.01
KEPT = 16  # readings
USUAL_UPDATES = 10  # that show how many forward passes an update has
WATCHED_EVALUATIONS = 2
WATCHED_UPDATES = 8  # for which the start of the backward pass is known
WATCHED_BACKWARDS = 64  # of each of them
SAME_DIRECTION = 0.9999  # cosine
PART = "diagnosis"
UNMEASURED = "Some rules of the diagnosis are not checked."
_DROPOUT = nn.modules.dropout._DropoutNd
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Plan:
    """At which steps the run is measured: more closely where it begins, and after a remedy.

    Attributes:
        period: steps between two, after the first ones.
        since: the step after which it began, or had its latest remedy.
    """

    def __init__(self) -> None:
        self.period = PERIOD
        self.since = 0
        self._again = -1
        self._spent = 0.0
        self._largest = 0.0  # of the costs; the first look at a GPU loads code
        self._checks = 0
        self._to_come: tuple[int, ...] = MEASURED_AT

    def is_due(self, step: int) -> bool:
        if step - self.since in FIRST_STEPS or step in SURE_STEPS or step == self._again:
            return True
        return step > FIRST_STEPS[-1] and step % self.period == 0

    def next_due(self, step: int) -> int:
        """The first step after this one that is measured."""
        later = (max(step, FIRST_STEPS[-1]) // self.period + 1) * self.period
        if self._again > step:
            later = min(later, self._again)
        if step >= max(SURE_STEPS[-1], self.since + FIRST_STEPS[-1]):
            return later
        fixed = (*(self.since + due for due in FIRST_STEPS), *SURE_STEPS)
        return min(later, min((due for due in fixed if due > step), default=later))

    def look_again(self, step: int) -> None:
        """What was seen at this step waits for a second look, which no long period delays.

        A second look asks for no third one, so it at most doubles what looking costs.
        """
        if step != self._again:
            self._again = step + PERIOD

    def reads_forward(self, step: int) -> bool:
        return step - self.since in FORWARD_STEPS or (
            step > FIRST_STEPS[-1] and step % (self.period * FORWARD_EVERY) == 0
        )

    def add(self, seconds: float) -> None:
        """Cost of one planned step."""
        self._spent += seconds
        self._largest = max(self._largest, seconds)
        self._checks += 1

    def adapt(self, step: int, step_seconds: float) -> None:
        """From the fixed steps on, sets the period from what a planned step has cost on average.

        On a GPU a planned step is over with the one after it, when its numbers have arrived.
        """
        if not self._to_come or step < self._to_come[0]:
            return
        self._to_come = tuple(due for due in self._to_come if due > step)
        if self._checks < 2 or not step_seconds > 0:
            return
        least = min(LARGEST_BUDGET * step_seconds, LEAST_SECONDS_PER_STEP)
        usual = (self._spent - self._largest) / (self._checks - 1)
        needed = usual / max(BUDGET * step_seconds, least)
        # Rounded up to a few values, so that two runs of the same script have the same plan.
        self.period = PERIOD * 2 ** max(0, math.ceil(math.log2(max(1.0, needed / PERIOD))))


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
        step_clock: seconds, monotonic, of what a step takes, which may be to wait for data.

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
        step_clock: Callable[[], float] = time.perf_counter,
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
        self._start = _Start(self._closed)
        self._modes = _Modes(model)
        modules = list(model.named_modules())
        self._dropouts = [(name, module) for name, module in modules if _drops(module) > 0]
        self._batch_norms = [(n, m) for n, m in modules if isinstance(m, _BATCH_NORM)]
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
        return self._start.facts()

    @property
    def modes(self) -> Modes:
        return self._modes.facts

    @property
    def dropouts(self) -> tuple[tuple[str, float], ...]:
        """(layer, probability) of each one that is on."""
        found = ((name, module, _drops(module)) for name, module in self._dropouts)
        return tuple((name, p) for name, module, p in found if module.training and p > 0)

    @property
    def batch_norms(self) -> tuple[tuple[str, float], ...]:
        """(layer, momentum) of each one that keeps statistics in training mode."""
        return tuple(
            (name, float(module.momentum))
            for name, module in self._batch_norms
            if module.training and module.track_running_stats and module.momentum is not None
        )

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
        return self._start.done

    def _arm(self) -> None:
        armed = self._due or self._modes.counts or not self._start.done
        for part in self._parts:
            part.arm(armed)

    def spend(self, seconds: float) -> None:
        """What the rules have cost in a measured step."""
        self.plan.add(seconds + self._seconds)
        self._seconds = 0.0
        if self.step > 1:
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
        self._start.close()
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
        self._start.on_update_begins(optimizer)
        # Read here: after the update a scheduler has set the rate of the next one.
        self._rate = _higher(self._rate, highest_rate([optimizer]))
        if self._due:
            started = self._cost_clock()
            self._gradient.remember(optimizer)
            self._seconds += self._cost_clock() - started

    def _after_update(self, optimizer: torch.optim.Optimizer) -> None:
        started = self._cost_clock()
        self._modes.on_update(self.step + 1)
        self._start.on_update(optimizer)
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


class _Start:
    """Whether gradients were cleared between two updates, from one parameter's own hook.

    Attributes:
        done: enough updates were seen.
    """

    def __init__(self, closed: Callable[..., Any]) -> None:
        self._closed = closed
        self._handle: RemovableHandle | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        # For each update, what each of its backward passes started from: a gradient that is not 0.
        self._left: list[list[HostCopy | None]] = []
        # For each whole update: the optimizer used the gradient that was there before.
        self._accumulated: list[bool] = []
        # For each whole update: its gradient is that of the last backward pass alone.
        self._newest_alone: list[HostCopy | None] = []
        self._newest: Tensor | None = None  # a few elements of what a backward pass has added
        self._smallest: nn.Parameter | None = None
        self._old = 0  # id of the gradient that the first backward pass found
        self._asked: tuple[list[nn.Parameter], HostTransfer] | None = None
        self._first = True
        self._in_step = False
        self.done = False

    def on_update_begins(self, optimizer: torch.optim.Optimizer) -> None:
        """The script has called the optimizer, which may call the model in a closure."""
        self._in_step = self._in_step or optimizer is self._optimizer

    def on_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step is over: the next backward pass is the first of an update."""
        is_other = self._optimizer is not None and self._optimizer is not optimizer
        if self.done or is_other:
            return
        self._in_step = False
        if self._smallest is not None and len(self._left) > len(self._accumulated):
            # autograd.grad gives the script a new tensor, and adds nothing to the old one.
            self._accumulated.append(id(self._smallest.grad) == self._old)
            self._newest_alone.append(self._is_newest_alone())
        if self._handle is None:
            self._watch(optimizer)
        elif len(self._left) >= WATCHED_UPDATES:
            self.close()
        self._first = True

    def facts(self) -> Zeroing:
        carried = []
        for starts, accumulated in zip(self._left, self._accumulated, strict=False):
            if any(left is not None and not left.has_arrived for left in starts):
                break
            # One from zero is enough: the backward pass of another model's loss, as in a GAN, may
            # have left a gradient here before the script cleared it.
            old = all(left is not None and left.number() != 0 for left in starts)
            carried.append(old and accumulated)
        backwards = tuple(map(len, self._left))[: len(carried)]
        # In a closure the optimizer itself begins anew at each evaluation, as L-BFGS does.
        cleared = tuple(
            alone is not None
            and alone.has_arrived
            and bool(alone.number())
            and all(left is None or left.number() == 0 for left in starts)
            for starts, alone in zip(self._left, self._newest_alone, strict=False)
        )
        return Zeroing(tuple(carried), backwards, cleared[: len(carried)])

    def _is_newest_alone(self) -> HostCopy | None:
        """Clipping may have scaled it; None: there was one backward pass, or no gradient."""
        newest, self._newest = self._newest, None
        used = None if self._smallest is None else gradient_values(self._smallest)
        if newest is None or used is None or used.numel() < newest.numel():
            return None
        used = used.detach().reshape(-1)[: newest.numel()].to(newest.dtype)
        if newest.numel() < 2:
            return None  # two numbers always have one direction
        alike = torch.nn.functional.cosine_similarity(used.float(), newest.float(), dim=0)
        return copy_to_host(alike > SAME_DIRECTION)

    def close(self) -> None:
        self.done = True
        if self._handle is not None:
            self._handle.remove()

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        """The smallest tensor that has learned in this step; on a GPU, in the step before."""
        asked, self._asked = self._asked, None
        if asked is None:
            asked = _alive(optimizer)
            if asked[1].is_late:
                self._asked = asked
                return
        smallest, transfer = asked
        alive = [
            p for p, learns in zip(smallest, transfer.take("alive"), strict=True) if learns == 1
        ]
        if not alive:
            return
        self._optimizer, parameter = optimizer, alive[0]
        self._smallest = parameter

        def before_accumulation(added: Tensor) -> None:
            self._newest = None
            if self._first:
                self._first = False
                self._left.append([])
                self._old = id(parameter.grad)
            elif not self._in_step and has_numbers(added):
                self._newest = added.detach().reshape(-1)[:64].clone()
            if not self._left or len(self._left[-1]) >= WATCHED_BACKWARDS:
                return
            left = gradient_values(parameter)
            few = None if left is None else left.detach().reshape(-1)[:64]
            self._left[-1].append(None if few is None else copy_to_host((few != 0).any()))

        self._handle = parameter.register_hook(_Unpickled(self._closed(before_accumulation)))  # type: ignore[no-untyped-call]


def _alive(optimizer: torch.optim.Optimizer) -> tuple[list[nn.Parameter], HostTransfer]:
    """The smallest tensors, and on their way to the host, which of them have a gradient."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    usable = [p for p in parameters if p.is_leaf and type(p) is nn.Parameter]
    smallest = sorted(usable, key=lambda p: p.numel())[:8]
    gradients = [gradient_values(p) for p in smallest]
    transfer = HostTransfer()
    transfer.add("alive", [None if g is None else (g != 0).any() for g in gradients])
    transfer.start()
    return smallest, transfer


class _Unpickled(PassingHook):
    """Of a tensor: pickle drops it without a warning."""

    __torch_unserializable__ = True


class _Modes:
    """The mode of the modules whose result depends on it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [m for m in model.modules() if _depends_on_mode(m)]
        self._inside = {id(child): m for m in model.modules() for child in m.children()}
        self._seen_update = False
        norms = [m for m in self._modules if isinstance(m, _BATCH_NORM)]
        counters = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
        at_once = [counter for counter in counters if not is_late(counter)]
        self._counter: Tensor | None = at_once[0] if at_once else None
        self._batches = int(self._counter) if self._counter is not None else 0
        self._updates = 0
        self._usual = 0
        self.facts = Modes()

    def on_update(self, step: int) -> None:
        """At an optimizer's step they are still in the mode of the forward pass."""
        self._count_batches()
        if not self._seen_update:
            self._seen_update = True
            self._modules = self._of_learning_parts()
        training, old = sum([module.training for module in self._modules]), self.facts
        left = 0 if training else sum(self._is_left(module) for module in self._modules)
        if training and training == old.in_training:
            return  # as in the update before
        evaluating = left > 0
        again = evaluating and old.updates > 0
        self.facts = Modes(
            in_training=training,
            in_evaluation=left if evaluating else len(self._modules) - training,
            since_step=(old.since_step if again else step) if evaluating else 0,
            updates=old.updates + 1 if evaluating else 0,
            was_training=old.was_training or bool(training),
            extra_batches=old.extra_batches,
            extra_steps=old.extra_steps,
            evaluated_in_training=old.evaluated_in_training,
        )

    def _is_left(self, module: nn.Module) -> bool:
        """In evaluation mode, and not by itself: a script that keeps its statistics on purpose sets
        this module alone, and what it is in trains."""
        inside = self._inside.get(id(module))
        return not module.training and (inside is None or not inside.training)

    def _of_learning_parts(self) -> list[nn.Module]:
        """Without those of frozen parts, which are kept in evaluation mode on purpose."""
        names = {id(module): name for name, module in self._model.named_modules()}
        return [m for m in self._modules if _learns(self._model, names[id(m)])]

    @property
    def counts(self) -> bool:
        """There is something to look at in each update."""
        return bool(self._modules)

    def evaluating(self, closed: Callable[..., Any]) -> list[RemovableHandle]:
        """Counts calls of these modules in training mode, until the hooks are removed."""

        def count(module: nn.Module, _: Any) -> None:
            if module.training:
                calls = self.facts.evaluated_in_training + 1
                self.facts = replace(self.facts, evaluated_in_training=calls)

        hook = PassingHook(closed(count))
        return [module.register_forward_pre_hook(hook) for module in self._modules]

    def _count_batches(self) -> None:
        """Compares the batches since the update before with those of the first updates."""
        if self._counter is None:
            return
        batches, self._batches = int(self._counter) - self._batches, int(self._counter)
        if self._updates < USUAL_UPDATES:
            self._updates += 1
            self._usual = max(self._usual, batches)
        elif batches >= self._usual + 2:
            old = self.facts
            self.facts = replace(
                old,
                extra_batches=old.extra_batches + batches - self._usual,
                extra_steps=old.extra_steps + 1,
            )


def _learns(model: nn.Module, name: str) -> bool:
    """The smallest part of the model around this module that has parameters trains one."""
    path = name.split(".")
    for end in range(len(path), -1, -1):
        part = model.get_submodule(".".join(path[:end]))
        trainable = [parameter.requires_grad for parameter in part.parameters()]
        if trainable:
            return any(trainable)
    return False


def _drops(module: nn.Module) -> float:
    """Probability with which it sets a value to 0 in training mode."""
    if isinstance(module, _DROPOUT):
        return float(module.p)
    if isinstance(module, nn.RNNBase):
        return float(module.dropout) if module.num_layers > 1 else 0.0
    return float(module.dropout) if isinstance(module, nn.MultiheadAttention) else 0.0


def _depends_on_mode(module: nn.Module) -> bool:
    if isinstance(module, _DROPOUT):
        return module.p > 0
    return isinstance(module, _BATCH_NORM) and module.track_running_stats


def _finite(tensors: Iterable[Tensor]) -> bool:
    found = [t for t in tensors if t.is_floating_point() and not t.is_meta and t.numel()]
    return all(bool(tensor.isfinite().all()) for tensor in found)
