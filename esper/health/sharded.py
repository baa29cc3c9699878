"""Samples the health of a model whose parameters are spread over ranks.

Shape legend: P parts of the model on this rank, one for each parameter.

Each rank takes the norms of its own parts. Their squares are summed over the ranks, by one
all-reduce for each frame that runs in the background:

    step k-1     copy this rank's parts of the weights
    optimizer    at the end of its own step: norms of its parts of gradients and updates
    step k       norms of the weights; one copy to the host
    arrived      start the sum; in the same step where there is no GPU, otherwise in the next
    later        rank 0: when the sum is there, the frame of step k
    next frame   every rank has the sum of the last one, and so knows when the frame after this is

The ranks must start the same sums in the same order, and have no other message for it: the period
after a frame is part of the sum before it. Rank 0 measures what sampling costs, and decides.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from esper.contracts import HealthFrame, LayerInfo
from esper.fail_closed import FailClosed
from esper.health.activations import ActivationReader, Watch, Watcher
from esper.health.measurement import Measurement, Moments
from esper.health.optimizer_steps import dense, has_numbers, left_scale, norms_of
from esper.health.pace import SamplingPace
from esper.health.parameter_map import GRAFT_MARK, ParameterMap
from esper.health.sampler import PATIENCE_CALLS, STEPS_TIMED
from esper.health.transfers import HostTransfer
from esper.sharding import FrameSum, Layout, Part, is_dtensor, local

NORM_SUM = "sum of the ranks' norms"
_NO_NORMS = "Norms of gradients, weights and updates are not measured."
PATIENCE_S = 10.0  # the other ranks are at most one step away, so their messages are soon there
# Sums of squares of the names before the bar, of plain numbers after it.
_SQUARED = ("gradient", "weight", "update", "old weight", "moment mean")
_PLAIN = ("entries", "moment power")
_ROWS = (*_SQUARED, *_PLAIN)
_HEADER = 4  # step, its square, next period, whether rank 0 wants a meeting

Norms = dict[int, Tensor]  # place of a part -> a norm on its device


@dataclass(slots=True)
class _Reading:
    """What this rank reads for one frame.

    Attributes:
        due: optimizers that have made no step since the frame was prepared.
        before: copies of this rank's weights.
        addends: of gradients that only the sum over the ranks makes whole.
    """

    due: set[int] = field(default_factory=set)
    before: Norms = field(default_factory=dict)
    gradients: Norms = field(default_factory=dict)
    entries: Norms = field(default_factory=dict)
    updates: Norms = field(default_factory=dict)
    olds: Norms = field(default_factory=dict)
    addends: Norms = field(default_factory=dict)


class ShardedSampler:
    """Turns a training loop on several ranks into health frames of rank 0.

    Every rank has one, and calls :meth:`step` in the same steps. The arguments are those of
    :class:`esper.health.HealthSampler`, and these:

    Args:
        layout: this rank's parts of the parameters.
        total: sums a vector over the ranks.
        leads: this is rank 0, which makes the frames.
        wants_meeting: rank 0 has something for all ranks; see :meth:`meets_next`.
    """

    def __init__(
        self,
        layout: Layout,
        total: FrameSum,
        optimizers: Iterable[torch.optim.Optimizer],
        layers: Sequence[LayerInfo],
        *,
        watch: Watch,
        leads: bool,
        wants_meeting: Callable[[], bool] = bool,
        pace: SamplingPace | None = None,
        clock: Callable[[], float] = time.perf_counter,
        fail_closed: FailClosed | None = None,
    ) -> None:
        self._layout = layout
        self._total = total
        self._optimizers = tuple(optimizers)
        self._names = tuple(layer.name for layer in layers)
        self._leads = leads
        self._wants_meeting = wants_meeting
        self._pace = pace or SamplingPace()
        self._clock = clock
        self._closed = fail_closed or FailClosed()
        self._activations = ActivationReader(_of_this_rank(watch), layers, clock, self._closed)
        self._handles: list[RemovableHandle] = []
        self._hooked: list[torch.optim.Optimizer] = []  # by place
        self._step = -1
        self._due = -1  # the step of the next frame
        self._period = 0  # after that frame
        self._meeting = -1  # the step at which all ranks meet
        self._last_deep = 0
        self._deep_now = False
        self._reading: _Reading | None = None
        self._sending: Measurement | None = None  # its numbers are on their way to the host
        self._summing: Measurement | None = None  # rank 0: its numbers are being summed
        self._ready: HealthFrame | None = None
        self._times = _StepTimes(clock)
        self._hook_optimizers()
        self.refresh()

    # -- the loop ------------------------------------------------------------------------------

    @property
    def cost_ratio(self) -> float:
        """Time spent in sampling / time of everything else so far; NaN before the second step."""
        return self._times.cost_ratio

    @property
    def typical_step(self) -> float:
        """Seconds of a step without sampling; NaN before the second step."""
        return self._times.typical if self._times.is_known else math.nan

    def refresh(self) -> None:
        """Reads the model's parameters again; call it after a graft or an undo, on every rank."""
        self._parts = [part for part in self._layout.parts() if has_numbers(part.weight)]
        self._map = _map_of(self._parts, self._names)
        self._copies_P = np.array([part.copies for part in self._parts])
        self._addends = [i for i, part in enumerate(self._parts) if part.is_addend]
        self._reading = self._sending = None

    def close(self) -> None:
        """Removes all watchers from the model, and the hooks from its optimizers."""
        self._activations.disarm()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def meets_next(self) -> bool:
        """In the next call of :meth:`step` all ranks exchange messages, as rank 0 wanted.

        The ranks know it from the sum of the last frame, so it is not earlier than a frame later.
        """
        if self._step + 1 == self._due and self._total.open:
            self._closed.run(self._take_sum, part=NORM_SUM, unmeasured=_NO_NORMS)
        return self._step + 1 == self._meeting

    def step(
        self, step: int, loss: float | Tensor | None, metrics: Mapping[str, float] | None = None
    ) -> HealthFrame | None:
        """As :meth:`esper.health.HealthSampler.step`; the frame comes some steps later."""
        self._times.enter()
        if self._due < 0:
            self._pace.begin(step)
            self._period = self._pace.at(step).frame
            self._due = self._pace.next_frame(step - 1)
            self._last_deep = step - 1
        self._step = step
        advance = partial(self._advance, loss, metrics or {})
        self._closed.run(advance, part=NORM_SUM, unmeasured=_NO_NORMS)
        self._times.leave()
        frame, self._ready = self._ready, None
        return frame

    def _advance(self, loss: float | Tensor | None, metrics: Mapping[str, float]) -> None:
        if self._sending is not None:
            self._start_sum()
        elif self._total.open:
            self._take_sum(0.0)
        if self._step >= self._due and not self._waits:
            if self._total.open:
                self._take_sum()
            self._sample(loss, metrics)
        if self._step == self._due - 1:
            self._prepare()

    @property
    def _waits(self) -> bool:
        """The due frame waits for an optimizer: gradients that still accumulate are no result."""
        waiting = self._reading is not None and bool(self._reading.due)
        return waiting and self._step < self._due + PATIENCE_CALLS

    # -- this rank's numbers -------------------------------------------------------------------

    @torch.no_grad()
    def _prepare(self) -> None:
        """The step before a frame: keep the weights, arm the watchers."""
        self._reading = _Reading(
            due=set(range(len(self._handles))),
            before={place: part.weight.clone() for place, part in enumerate(self._parts)},
        )
        self._deep_now = self._leads and self._pace.is_deep(self._due, self._last_deep)
        if self._deep_now:
            self._activations.arm()

    def _hook_optimizers(self) -> None:
        for optimizer in self._optimizers:
            if hasattr(optimizer, "_optimizer_step_post_hooks"):
                read = self._closed.wrap(
                    self._reader(len(self._handles)), part=NORM_SUM, unmeasured=_NO_NORMS
                )
                self._handles.append(optimizer.register_step_post_hook(read))
                self._hooked.append(optimizer)

    def _reader(self, place: int) -> Callable[..., None]:
        def read(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            reading = self._reading
            if reading is None or place not in reading.due:
                return
            reading.due.discard(place)
            started = self._clock()
            with torch.no_grad():
                mine = self._held_by((optimizer,))
                self._read_gradients(reading, mine, left_scale(optimizer))
                # Those of grafts, which are put aside at the end of this step.
                held = self._held_by(self._optimizers)
                left = {*range(len(self._parts))} - {*held} - reading.gradients.keys()
                self._read_gradients(reading, sorted(left))
                self._read_updates(reading, mine)
            self._times.add_hidden(self._clock() - started)

        return read

    def _held_by(self, optimizers: Iterable[torch.optim.Optimizer]) -> list[int]:
        """Places of the parts that the optimizers train."""
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        held = {id(p) for group in groups for p in group["params"]}
        return [i for i, part in enumerate(self._parts) if id(part.holder) in held]

    def _read_gradients(
        self, reading: _Reading, places: Iterable[int], scale: Tensor | None = None
    ) -> None:
        found = {i: dense(self._parts[i].gradient) for i in places}
        gradients = {i: g for i, g in found.items() if g is not None}
        one = torch.ones((), dtype=torch.float32, device="cpu")
        factor = one if scale is None else 1.0 / scale
        for i, norm in _norms(gradients).items():
            reading.gradients[i] = norm * factor.to(norm)
        reading.entries.update(_norms(gradients, 0.0))
        for i in gradients.keys() & set(self._addends):
            share = factor.to(gradients[i]) / self._parts[i].gradient_copies
            reading.addends[i] = gradients[i].flatten() * share

    def _read_updates(self, reading: _Reading, places: Iterable[int]) -> None:
        before = {i: reading.before.pop(i) for i in places if i in reading.before}
        if not before:
            return
        reading.olds.update(_norms(before))
        torch._foreach_sub_([*before.values()], [self._parts[i].weight for i in before])
        reading.updates.update(_norms(before))

    @torch.no_grad()
    def _sample(self, loss: float | Tensor | None, metrics: Mapping[str, float]) -> None:
        """Reads what is due. A rank that read nothing before takes part in the sum all the same."""
        started = self._clock()
        reading, self._reading = self._reading or _Reading(), None
        places = range(len(self._parts))
        # A parameter of no optimizer, or of one that made no step.
        self._read_gradients(reading, [i for i in places if i not in reading.gradients])
        silent = set(self._held_by(self._hooked[place] for place in reading.due))
        no_step = [i in silent for i in places]
        self._read_updates(reading, places)
        measurement = Measurement(
            self._step, self._names, self._map, dict(metrics), no_step=no_step
        )
        self._add_metrics(measurement, loss)
        transfer = measurement.numbers
        weights = _norms({i: part.weight for i, part in enumerate(self._parts)})
        rows = {
            "gradient": reading.gradients,
            "weight": weights,
            "update": reading.updates,
            "old weight": reading.olds,
            "entries": reading.entries,
        }
        for name, norms in rows.items():
            transfer.add(name, [norms.get(i) for i in places])
        for i, addend in reading.addends.items():
            transfer.add(f"addend {i}", [addend])
        moments = _moments_of(self._parts, self._optimizers)
        measurement.add_moments(moments)
        self._add_activations(measurement)
        is_late = measurement.send()
        self._sending = measurement
        self._times.add_frame(self._clock() - started)
        if not is_late:
            self._start_sum()
        self._plan()

    def _add_activations(self, measurement: Measurement) -> None:
        if not self._deep_now:
            return
        self._activations.disarm()
        measurement.add_activations(self._activations.seen)
        self._times.add_hidden(self._activations.seconds)
        self._pace.add_deep(self._activations.seconds)
        self._last_deep = self._step
        self._deep_now = False

    def _add_metrics(self, measurement: Measurement, loss: float | Tensor | None) -> None:
        known = measurement.metrics
        if "loss" not in known and not (isinstance(loss, Tensor) and is_dtensor(loss)):
            measurement.add_metric("loss", loss)
        if self._optimizers and "lr" not in known:
            measurement.add_metric("lr", self._optimizers[0].param_groups[0]["lr"])
        known.setdefault("frame_period", float(self._period))
        if self._times.is_known:
            known.setdefault("step_ms", 1e3 * self._times.typical)
            known.setdefault("sampling_ratio", self.cost_ratio)

    def _plan(self) -> None:
        """When the next frame is due: every rank has the same period."""
        self._due = (self._step // self._period + 1) * self._period
        if self._leads:
            self._pace.add_frame(self._times.take_frame())
            if self._times.is_known:
                self._pace.adapt(self._step, self._times.typical)

    # -- the sum -------------------------------------------------------------------------------

    def _start_sum(self) -> None:
        measurement, self._sending = self._sending, None
        assert measurement is not None
        step, period = measurement.step, self._pace.at(measurement.step).frame
        own = [float(period), float(self._wants_meeting())] if self._leads else [0.0, 0.0]
        rows = np.stack([self._share(measurement.numbers, name) for name in _ROWS])
        known = ~np.isnan(rows)
        addends = [self._addend(measurement.numbers, i) for i in self._addends]
        header = [float(step), float(step) ** 2, *own]
        numbers = [header, np.where(known, rows, 0.0).ravel(), known.ravel(), *addends]
        self._summing = measurement if self._leads else None
        self._total.start(torch.from_numpy(np.concatenate(numbers)))

    def _share(self, numbers: HostTransfer, name: str) -> np.ndarray:
        """float64 [P]: this rank's share of a sum; elements that n ranks have count n times less.

        NaN where this rank does not know it.
        """
        if name not in numbers:
            return np.full(len(self._parts), np.nan)
        values = numbers.take(name)
        shares: np.ndarray = (np.square(values) if name in _SQUARED else values) / self._copies_P
        return shares

    def _addend(self, numbers: HostTransfer, place: int) -> np.ndarray:
        name = f"addend {place}"
        if name not in numbers:
            return np.zeros(self._parts[place].shape.numel())
        addend: np.ndarray = numbers.take(name)[0]
        return addend

    def _take_sum(self, patience_s: float | None = None) -> None:
        """What the sum says, if it is there; on rank 0 it completes the frame.

        Raises:
            TimeoutError: another rank did not take part.
        """
        summed = self._total.take(PATIENCE_S if patience_s is None else patience_s)
        if summed is None:
            if patience_s is None:
                raise TimeoutError(
                    f"a rank took no part for {PATIENCE_S:.0f} s; call session.step on every rank"
                )
            return
        step, step_squared, period, meeting = summed[:_HEADER].tolist()
        size = self._layout.size
        together = abs(step_squared * size - step * step) < 0.5
        self._period = max(1, int(period))
        if meeting and together:
            self._meeting = self._due
        measurement, self._summing = self._summing, None
        if measurement is not None:
            self._ready = self._frame(measurement, summed[_HEADER:].numpy())

    def _frame(self, measurement: Measurement, summed: np.ndarray) -> HealthFrame:
        sizes = [self._parts[i].shape.numel() for i in self._addends]
        count = len(_ROWS) * len(self._parts)
        if len(summed) == 2 * count + sum(sizes):  # otherwise a graft has come or gone since
            sums, known, addends = np.split(summed, [count, 2 * count])
            rows = np.where(known > 0.5, np.where(np.isnan(sums), np.inf, sums), np.nan)
            totals = dict(zip(_ROWS, rows.reshape(len(_ROWS), -1), strict=True))
            gradient = totals["gradient"]
            pieces = np.split(addends, np.cumsum(sizes)[:-1]) if sizes else []
            for i, addend in zip(self._addends, pieces, strict=True):
                if not np.isnan(gradient[i]):
                    gradient[i] = np.square(addend).sum()
            measurement.numbers = _Summed(measurement.numbers, totals)
        return measurement.frame()


class _Summed(HostTransfer):
    """The numbers of one frame: sums over the ranks, and the rest as this rank measured it."""

    def __init__(self, own: HostTransfer, totals: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self._own = own
        self._totals = totals

    def names(self, prefix: str) -> list[str]:
        return self._own.names(prefix)

    def __contains__(self, name: str) -> bool:
        return name in self._own

    def take(self, name: str, *, not_a_number: float = math.inf) -> np.ndarray:
        if name not in self._totals:
            return self._own.take(name, not_a_number=not_a_number)
        totals = self._totals[name]
        return np.sqrt(totals) if name in _SQUARED else totals


class _StepTimes:
    """How long steps take, and how much of that is sampling, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._steps: deque[float] = deque(maxlen=STEPS_TIMED)
        self._spent = 0.0
        self._elapsed = 0.0
        self._frame = 0.0
        self._entered = 0.0
        self._left: float | None = None

    @property
    def is_known(self) -> bool:
        """Two steps have been seen."""
        return bool(self._steps)

    @property
    def typical(self) -> float:
        """Of a step without sampling."""
        return statistics.median(self._steps)

    @property
    def cost_ratio(self) -> float:
        return self._spent / self._elapsed if self._elapsed > 0 else math.nan

    def enter(self) -> None:
        self._entered = self._clock()
        if self._left is not None:
            self._steps.append(self._entered - self._left)
            self._elapsed += self._entered - self._left

    def leave(self) -> None:
        self._left = self._clock()
        self._spent += self._left - self._entered

    def add_hidden(self, seconds: float) -> None:
        """Sampling inside the user's own step."""
        self._spent += seconds
        self._elapsed -= seconds
        self._frame += seconds

    def add_frame(self, seconds: float) -> None:
        self._frame += seconds

    def take_frame(self) -> float:
        """What the present frame cost."""
        seconds, self._frame = self._frame, 0.0
        return seconds


@dataclass(slots=True)
class _PartMap(ParameterMap):
    """A map whose columns are parts of parameters."""

    whole_sizes: Sequence[int] = ()

    @property
    def sizes_P(self) -> np.ndarray:
        return np.array(self.whole_sizes, dtype=np.float64)


def _of_this_rank(watch: Watch) -> Watch:
    """Watchers get this rank's part of a distributed output: reading another needs a collective."""

    def watch_local(name: str, watcher: Watcher) -> Callable[[], None]:
        return watch(name, lambda x, y: watcher(local(x), local(y)))

    return watch_local


def _map_of(parts: Sequence[Part], names: Sequence[str]) -> ParameterMap:
    """Which parts belong to which layers, by the parameters' names in the original model."""
    rows = {name: row for row, name in enumerate(names)}
    host: list[tuple[int, int]] = []
    graft: list[tuple[int, int]] = []
    for column, part in enumerate(parts):
        for row, rest in _layers_of(part, rows):
            (graft if GRAFT_MARK in rest else host).append((row, column))
    return _PartMap.of_pairs(
        [part.holder for part in parts],
        len(names),
        host,
        graft,
        whole_sizes=[part.shape.numel() for part in parts],
    )


def _layers_of(part: Part, rows: Mapping[str, int]) -> Iterator[tuple[int, list[str]]]:
    """(row of a layer, the rest of the part's name below it); a block and its layers both count."""
    found: dict[int, list[str]] = {}
    for name in part.names:
        pieces = name.split(".")
        for length in range(len(pieces)):
            row = rows.get(".".join(pieces[:length]))
            if row is not None:
                found.setdefault(row, pieces[length:])
    yield from found.items()


def _norms(tensors: Mapping[int, Tensor], order: float = 2.0) -> Norms:
    """By place; none for a part without elements on this rank."""
    norms = zip(tensors, norms_of([*tensors.values()], order), strict=True)
    return {place: norm for place, norm in norms if norm is not None}


def _moments_of(
    parts: Sequence[Part], optimizers: Iterable[torch.optim.Optimizer]
) -> Moments | None:
    """This rank's parts of Adam's moments; None if there is no Adam."""
    groups = {
        id(p): (optimizer.state.get(p, {}), group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    found = Moments.empty(len(parts))
    for place, part in enumerate(parts):
        state, group = groups.get(id(part.holder), ({}, {}))
        if {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
            own = {name: part.of_holder(state[name]) for name in ("exp_avg", "exp_avg_sq")}
            found.keep(place, {**state, **own}, group)
    return found if found.is_known else None
