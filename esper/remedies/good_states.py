"""States of a run that were good, kept so that a sick run can go back to one of them.

A state is the weights, the buffers, and what the optimizers have accumulated for them. It is a
candidate when it is taken, and good once the run has stayed healthy for a while after it: a state
that was taken on the way into a divergence is never offered. Candidates of a sick run are dropped,
and good states stay, so the last good one is never replaced while the run is sick, neither in
memory nor on disk.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper.exceptions import UndoError
from esper.grafting.tensors.digests import named_tensors
from esper.grafting.tensors.forms import Shape, shape_of
from esper.grafting.tensors.saved_values import write
from esper.health.pace import typical
from esper.remedies.good_state import State
from esper.remedies.state_folder import StateFolder
from esper.remedies.update_hooks import before_update

EVERY_STEPS = 100  # how often a candidate is taken, more often at the start
CONFIRMED_STEPS = 20  # for so long the run must stay healthy after a candidate
KEPT = 3
COSTS = 7  # of the latest copies, which tell what one costs
SHARE = 0.01  # of the run's time that copies may take
START_STEPS = 200  # for so long the state before training is kept too


class GoodStates:
    """A short history of good states.

    Args:
        optimizers: gives those that train the model now, without wrappers, those of grafts too.
        every: steps between two candidates; more where a copy takes long.
        limit_bytes: of all kept states together; fewer are kept where they are large. A model that
            does not fit once is not kept at all.
        clock: seconds. By default those of this thread alone: where other programs take the
            processor during one copy, the next states would be kept thousands of steps later.
        folder: where they are kept on disk too; None: in memory only.

    Attributes:
        marked: the state in which the first remedy for a fault was given, to go back to where no
            remedy helps. It need not be good.
        too_large: one state needs more than ``limit_bytes``, so none is kept.
        best: the state with the lowest held-out loss, with that loss.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Callable[[], Sequence[torch.optim.Optimizer]],
        *,
        every: int = EVERY_STEPS,
        kept: int = KEPT,
        limit_bytes: int = 2 << 30,
        clock: Callable[[], float] = time.thread_time,
        folder: StateFolder | None = None,
    ) -> None:
        self._model = model
        self._optimizers = optimizers
        self._every = every
        self._limit = limit_bytes
        self._folder = folder
        self._start: State | None = None
        self._waiting: list[Any] = []
        self._step = 0
        self._clock = clock
        self._began = (0.0, -1)  # when the latest candidate was taken, and after which step
        self._costs: deque[float] = deque(maxlen=COSTS)
        self._candidate: State | None = None
        self._good: deque[State] = deque(maxlen=kept)
        self._next = 0
        self._sick = False
        self.too_large = False
        self.marked: State | None = None
        self.best: tuple[float, State] | None = None
        self._best_is_new = False  # not on disk yet

    def keep_start(self) -> None:
        """Keeps the state before the next update, so that a run that is sick from the start can
        begin anew. It goes when there are good states of a run that is no longer young."""
        self.forget_start()
        optimizers = self._optimizers()

        def take(_: torch.optim.Optimizer) -> None:
            if self._start is None:
                self._start = self._take(self._step)

        self._waiting = before_update(optimizers, take, "The run cannot begin anew.")

    def forget_start(self) -> None:
        """Ends :meth:`keep_start`. Not inside an optimizer's step, which runs through its hooks."""
        self._stop_waiting()
        self._start = None

    def _stop_waiting(self) -> None:
        for handle in self._waiting:
            handle.remove()
        self._waiting = []

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the good states, oldest first."""
        return tuple(state.step for state in self._kept)

    @property
    def _kept(self) -> list[State]:
        return ([self._start] if self._start is not None else []) + list(self._good)

    @property
    def idle_until(self) -> int:
        """The next step at which something is copied or kept, unless the run falls sick."""
        due = self._next if self._candidate is None else self._candidate.step + CONFIRMED_STEPS
        if self._folder is None or self.best is None or not self._best_is_new:
            return due
        return min(due, self.best[1].step + CONFIRMED_STEPS)

    def on_step(self, step: int, *, healthy: bool) -> None:
        """Call at each step boundary, and later for steps before :attr:`idle_until`."""
        self._step, self._sick = step, not healthy
        self._write_best()
        if self._start is not None:
            self._stop_waiting()
        if not healthy:
            self._candidate = None
            self._next = step + CONFIRMED_STEPS
            return
        candidate = self._candidate
        if candidate is not None and step >= candidate.step + CONFIRMED_STEPS:
            self._candidate = None
            self._add(candidate)
        if self._candidate is None and step >= self._next:
            began = self._clock()
            self._candidate = self._take(step)
            # A single one that takes long must not change to which state a run goes back.
            self._costs.append(self._clock() - began)
            usual = min(self._every, max(CONFIRMED_STEPS, step))
            pays = self._steps_that_pay(typical(self._costs), began, step)
            # Doubled, and not measured to the step: several ranks must keep the same steps.
            self._next = step + usual * 2 ** max(0, math.ceil(math.log2(max(1, pays) / usual)))

    @property
    def why_not(self) -> str:
        """Why :meth:`keep` would keep nothing; empty: it would."""
        if self.too_large:
            return "the model is larger than the memory that good states may take"
        return "the run is sick, so its state is not a good one" if self._sick else ""

    def keep(self, step: int) -> None:
        """A person wants the present state: it counts as good at once, unless the run is sick."""
        state = None if self.why_not else self._take(step)
        if state is not None:
            if any(tensor.is_cuda for tensor in self._model.parameters()):
                torch.cuda.synchronize()  # it is written now, so its copies must have arrived
            self._add(state)

    def _add(self, state: State) -> None:
        """A good state, the youngest."""
        self._good.append(state)
        if self._step > START_STEPS:
            self.forget_start()
        self._drop_what_exceeds(state)
        if self._folder is not None:
            self._folder.write(self._model, state, [kept.step for kept in self._good])

    def _write_best(self) -> None:
        """Later than it was taken: a copy from a GPU arrives meanwhile."""
        if self._folder is None or self.best is None or not self._best_is_new:
            return
        loss, state = self.best
        if self._step >= state.step + CONFIRMED_STEPS:
            self._folder.write_best(self._model, state, loss)
            self._best_is_new = False

    def begin_anew(self) -> None:
        """The model was changed on purpose: no state from before it is offered any more."""
        self._candidate = None
        self._good.clear()
        if self._folder is not None:
            self._folder.clear()
        self.keep_start()

    def _steps_that_pay(self, seconds: float, now: float, step: int) -> int:
        """After how many steps a copy that took so long is at most :data:`SHARE` of their time."""
        since, at = self._began
        self._began = (now, step)
        per_step = (now - since) / (step - at) if step > at else 0.0
        return math.ceil(seconds / (SHARE * per_step)) if at >= 0 and per_step > 0 else 0

    def mark(self, step: int) -> None:
        """Keeps the present state as :attr:`marked`."""
        self.marked = self._take(step)

    def note_held_out(self, step: int, loss: float) -> None:
        """Keeps the present state where its held-out loss is the lowest so far."""
        if loss < (self.best[0] if self.best is not None else float("inf")):
            state = self._take(step)
            if state is not None:
                self.best = (loss, state)
                self._best_is_new = True

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: where the states are kept, not the states."""
        return {"id": "" if self._folder is None else self._folder.id}

    def find_again(self, state: dict[str, Any], step: int) -> None:
        """In a process that continues the run after ``step``: the states that were kept on disk."""
        if self._folder is None or not state["id"]:
            return
        self._folder.id = str(state["id"])
        found, self.best = self._folder.read(self._model, step)
        self._good.extend(found)
        self._step = step
        if found:
            self.forget_start()

    def close(self) -> None:
        """The run has ended."""
        self.forget_start()
        if self._folder is not None:
            self._folder.close()

    def before(self, step: int) -> State | None:
        """The youngest good state that is not younger than ``step`` and has the present form."""
        known = (state for state in reversed(self._kept) if state.step <= step)
        return next(filter(self.fits, known), None)

    def fits(self, state: State) -> bool:
        """The model still has the tensors of the state."""
        own = {name: shape_of(tensor) for name, tensor in named_tensors(self._model)}
        return _form(state) == own

    def restore(self, state: State) -> None:
        """Copies a state into the model and its optimizers; schedules and random streams go on.

        Raises:
            UndoError: the model has other tensors now, so nothing was changed.
        """
        own = dict(named_tensors(self._model))
        if _form(state) != {name: shape_of(tensor) for name, tensor in own.items()}:
            raise UndoError(f"the model has other tensors than after step {state.step}", layer="")
        with torch.no_grad():
            for name, tensor in own.items():
                write(tensor, state.tensors[name])
            for optimizer in self._optimizers():
                for parameter in _parameters_of(optimizer):
                    _set_state(optimizer, parameter, state.moments.get(id(parameter)))

    def _take(self, step: int) -> State | None:
        tensors = dict(named_tensors(self._model))
        optimizers = self._optimizers()
        size = _bytes_of([*tensors.values(), *_moments_of(optimizers)])
        self.too_large = size > self._limit
        if self.too_large:
            return None
        return State(
            step,
            {name: _kept(tensor) for name, tensor in tensors.items()},
            {id(p): _copied(o.state[p]) for o in optimizers for p in o.state},
        )

    def _drop_what_exceeds(self, newest: State) -> None:
        one = _bytes_of([*newest.tensors.values(), *_values_of(newest.moments)])
        while len(self._good) > 1 and one * len(self._good) > self._limit:
            self._good.popleft()


def _form(state: State) -> dict[str, Shape]:
    return {name: shape_of(tensor) for name, tensor in state.tensors.items()}


def _parameters_of(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _kept(tensor: Tensor) -> Tensor:
    """A copy; in the host's memory for a tensor of a GPU, whose memory the training needs.

    The copy from a GPU does not wait: it is ordered before the next update by the stream, and so
    is a copy back.
    """
    found = tensor.detach()
    if found.device.type != "cuda":
        return found.clone()
    kept = torch.empty_like(found, device="cpu", pin_memory=True)
    return kept.copy_(found, non_blocking=True)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _kept(value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _set_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, saved: dict[str, Any] | None
) -> None:
    if saved is None:
        optimizer.state.pop(parameter, None)
        return
    # In place where it can be: an undo takes tensors that were put in for an act of the script.
    present = optimizer.state.setdefault(parameter, {})
    found = {key: _placed(value, present.get(key), parameter) for key, value in saved.items()}
    present.clear()
    present.update(found)


def _placed(value: Any, present: Any, parameter: Tensor) -> Any:
    """The present tensor with the saved values, or a copy of them where there is none."""
    if not isinstance(value, Tensor):
        return _copied(value)
    if isinstance(present, Tensor) and shape_of(present) == shape_of(value):
        write(present, value)
        return present
    # Scalars such as Adam's step count stay on the CPU.
    device = parameter.device if value.dim() else value.device
    return value.to(device, copy=True)


def _moments_of(optimizers: Iterable[torch.optim.Optimizer]) -> Iterable[Tensor]:
    return (
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def _values_of(moments: dict[int, dict[str, Any]]) -> Iterable[Tensor]:
    states = moments.values()
    return (value for state in states for value in state.values() if isinstance(value, Tensor))


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    kept = (tensor for tensor in tensors if not tensor.is_meta)
    return sum(tensor.nbytes for tensor in kept if tensor.layout is torch.strided)
