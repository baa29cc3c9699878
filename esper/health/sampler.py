"""Samples a model's health from inside its training loop, within a stated budget.

The loop:

    step k-1   copy the weights; where activations are due, arm their watchers
    forward    watchers read what each layer gives to the next, outside autograd
    optimizer  at the end of its own step: fused norms of gradients and updates
    step k     norms of the weights; one copy to the host for each device; on the CPU, the frame
    step k+1   on a GPU: the copy has arrived, so the frame of step k is made
    others     one comparison, which on short steps even covers several of them

Which steps these are is decided by :mod:`esper.health.pace`. A frame waits for a step of each
optimizer, where gradients accumulate.

Gradients, outputs and every random stream stay as they are: all reads are detached, and the
power iteration starts from its own generator. Nothing waits for a GPU. A value that was measured
and is not finite is written as ``inf``; NaN always means "not measured", and 0 is a measured zero.
Cost is host time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from esper.contracts import HealthFrame, LayerInfo
from esper.fail_closed import FailClosed
from esper.health.activations import ActivationReader, Watch
from esper.health.measurement import Measurement
from esper.health.optimizer_steps import OptimizerSteps
from esper.health.pace import SamplingPace
from esper.health.parameter_map import ParameterMap
from esper.health.stable_ranks import StableRanks

PATIENCE_CALLS = 64  # how long a frame waits for a step of each optimizer, for accumulation
STEPS_TIMED = 63


class HealthSampler:
    """Turns a training loop into health frames.

    Args:
        model: the model as it trains; layer names are its module names.
        optimizers: those that hold its parameters.
        layers: rows of the frames, in this order.
        watch: see :class:`esper.health.activations.ActivationReader`.
        watch_seconds: what watching itself took since the last call, beside the watchers.
        pace: which steps are sampled.
        clock: seconds, monotonic.
        fail_closed: where a watcher is reported that failed on an output.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        layers: Sequence[LayerInfo],
        *,
        watch: Watch,
        watch_seconds: Callable[[], float] = lambda: 0.0,
        pace: SamplingPace | None = None,
        clock: Callable[[], float] = time.perf_counter,
        fail_closed: FailClosed | None = None,
    ) -> None:
        self._model = model
        self._optimizers = tuple(optimizers)
        self._names = tuple(layer.name for layer in layers)
        self._clock = clock
        self._pace = pace or SamplingPace()
        self._activations = ActivationReader(watch, layers, clock, fail_closed or FailClosed())
        self._watch_seconds = watch_seconds
        self._ranks = StableRanks()
        self._steps = OptimizerSteps(self._optimizers, clock)
        self._before: list[Tensor] = []
        self._before_fresh = False
        self._deep_now = False
        self._late: Measurement | None = None  # its numbers are on their way
        self._next_frame = -1
        self._give_up_at = -1  # the step at which a frame no longer waits for an optimizer
        self._last_deep = 0
        self._frame_seconds = 0.0  # of the present sample
        self._after_seconds = 0.0  # of what was made of the frame before
        self._deep_seconds = 0.0
        self._step_seconds: deque[float] = deque(maxlen=STEPS_TIMED)
        self._spent = 0.0
        self._elapsed = 0.0
        self._last_exit: float | None = None
        self._last_step = 0
        self.refresh()

    @property
    def cost_ratio(self) -> float:
        """Time spent in sampling / time of everything else so far; NaN before the second step."""
        return self._spent / self._elapsed if self._elapsed > 0 else math.nan

    @property
    def typical_step(self) -> float:
        """Seconds of a step without sampling; NaN before the second step."""
        return statistics.median(self._step_seconds) if self._step_seconds else math.nan

    @property
    def idle_until(self) -> int:
        """The next step for which :meth:`step` must be called; those before may be left out."""
        return 0 if self._late is not None else self._next_frame - 1

    def refresh(self) -> None:
        """Reads the model's modules again; call it after a graft or an undo."""
        self._map = ParameterMap.of(self._model, self._names)
        self._others = self._map.of_no_optimizer(self._optimizers)
        self._held = self._count_held()
        self._before = []
        self._before_fresh = False
        self._steps.forget_weights()

    def spend(self, seconds: float) -> None:
        """What others have made of the frame at once; it counts as a part of the next one."""
        self._after_seconds = seconds

    def measure_soon(self, step: int) -> None:
        """A decision waits for a frame: one is due two steps after ``step``, beside the plan."""
        self._next_frame = min(self._next_frame, step + 2)

    def close(self) -> None:
        """Removes all watchers from the model, and the hooks from its optimizers."""
        self._activations.disarm()
        self._steps.close()

    def step(
        self, step: int, loss: float | Tensor | None, metrics: Mapping[str, float] | None = None
    ) -> HealthFrame | None:
        """Call once for each training step, anywhere in the loop; see :attr:`idle_until`.

        Args:
            step: the training step's number.
            loss: read only when a frame is due; None is unknown.
            metrics: more run-wide numbers for the frame.

        Returns:
            A frame when one is complete: on a GPU, that of an earlier step.
        """
        entered = self._clock()
        if self._last_exit is None:
            self._pace.begin(step)
            self._next_frame = self._pace.next_frame(step - 1)
            self._last_deep = step - 1
        else:
            passed, steps = entered - self._last_exit, max(1, step - self._last_step)
            self._step_seconds.extend([passed / steps] * steps)
            self._elapsed += passed
        frame = self._late_frame() if self._late is not None else None
        if step >= self._next_frame and not self._waits(step):
            frame = self._sample(step, loss, metrics or {}, entered) or frame
        elif step == self._next_frame - 1:
            self._prepare(entered)
        self._last_exit, self._last_step = self._clock(), step
        self._spent += self._last_exit - entered
        return frame

    def _waits(self, step: int) -> bool:
        """The due frame waits for an optimizer: gradients that still accumulate are no result."""
        return self._steps.missing and step < self._give_up_at

    def _prepare(self, entered: float) -> None:
        """The step before a frame: keep the weights, arm the watchers."""
        due = self._next_frame
        if self._count_held() != self._held:
            self.refresh()
        self._keep_weights()
        self._deep_now = self._pace.is_deep(due, self._last_deep)
        self._give_up_at = due + PATIENCE_CALLS
        columns = zip(self._map.parameters, self._before, strict=True)
        self._steps.measure_next(
            {id(parameter): copy for parameter, copy in columns},
            self._others,
            counts_zeros=self._deep_now,
        )
        now = self._clock()
        self._frame_seconds = now - entered + self._after_seconds
        self._after_seconds = 0.0
        if self._deep_now:
            self._activations.arm()
            self._deep_seconds = self._clock() - now

    @torch.no_grad()
    def _sample(
        self, step: int, loss: float | Tensor | None, metrics: Mapping[str, float], entered: float
    ) -> HealthFrame | None:
        """Reads everything that is due; the frame, unless its numbers arrive later."""
        measurement = Measurement(step, self._names, self._map, dict(metrics))
        self._add_metrics(measurement, loss)
        self._steps.end()
        measurement.add_norms(self._steps.norms, self._before if self._before_fresh else ())
        started = self._clock()
        self._frame_seconds += started - entered + self._steps.seconds
        is_deep, hidden = self._deep_now, self._steps.seconds
        if is_deep:
            self._activations.disarm()
            measurement.add_deep(self._activations.seen, self._ranks, self._optimizers)
            self._last_deep = step
            watched = self._activations.seconds + self._watch_seconds()
            hidden += watched
            self._deep_seconds += self._clock() - started + watched
        # Hooks ran inside the user's step: their time counts as sampling.
        self._spent += hidden
        self._elapsed -= hidden
        started = self._clock()
        is_late = measurement.send()
        frame = None if is_late else measurement.frame()
        self._late = measurement if is_late else None
        self._frame_seconds += self._clock() - started
        self._plan(step, is_deep=is_deep)
        return frame

    def _late_frame(self) -> HealthFrame:
        assert self._late is not None
        late, self._late = self._late, None
        return late.frame()

    def _plan(self, step: int, *, is_deep: bool) -> None:
        """The sample is complete: what it cost, and when the next one is due."""
        self._pace.add_frame(self._frame_seconds)
        if is_deep:
            self._pace.add_deep(self._deep_seconds)
        self._frame_seconds = self._deep_seconds = 0.0
        self._deep_now = False
        self._before_fresh = False
        if self._step_seconds:
            self._pace.adapt(step, statistics.median(self._step_seconds))
        self._next_frame = self._pace.next_frame(step)
        if self._next_frame == step + 1:
            self._prepare(self._clock())

    def _keep_weights(self) -> None:
        weights = [parameter.detach() for parameter in self._map.parameters]
        if not self._before:
            self._before = [weight.clone() for weight in weights]
        else:
            torch._foreach_copy_(self._before, weights)
        self._before_fresh = True

    def _add_metrics(self, measurement: Measurement, loss: float | Tensor | None) -> None:
        if "loss" not in measurement.metrics:
            measurement.add_metric("loss", loss)
        known = measurement.metrics
        if self._optimizers and "lr" not in known:
            measurement.add_metric("lr", self._optimizers[0].param_groups[0]["lr"])
        periods = self._pace.at(measurement.step)
        known.setdefault("frame_period", float(periods.frame))
        known.setdefault("deep_period", float(periods.deep))
        if self._step_seconds:
            known.setdefault("step_ms", 1e3 * statistics.median(self._step_seconds))
        if self._elapsed > 0:
            known.setdefault("sampling_ratio", self.cost_ratio)

    def _count_held(self) -> tuple[int, ...]:
        """Changes when a graft adds or removes parameters; far cheaper than walking modules."""
        return tuple(
            len(group["params"])
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        )
