"""Samples a model's health from inside its training loop, within a stated budget.

Shape legend: L layers, S signals, P parameters of the model.

The loop:

    step k-1   copy the weights, arm the activation watchers if deep
    forward    watchers read each layer's output once, outside autograd
    optimizer  at the end of its own step: fused norms of gradients and updates
    step k     norms of the weights, one transfer, a frame; it waits for a step of each optimizer
    others     two clock readings and a comparison

Gradients, outputs and every random stream stay as they are: all reads are detached, and the
power iteration starts from its own generator. A value that was measured and is not finite is
written as ``inf``; NaN always means "not measured". Cost is host time: on a GPU it includes the
wait for the one transfer of a frame, so it is overstated, never understated.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from esper.contracts import SIGNAL_INDEX, SIGNALS, HealthFrame, LayerInfo, Signal
from esper.fail_closed import FailClosed
from esper.health.optimizer_steps import OptimizerSteps, dense, has_numbers, norms_of
from esper.health.score import health_scores

Watcher = Callable[[Tensor, Tensor], None]
Watch = Callable[[str, Watcher], Callable[[], None]]

GRAFT_MARK = "esper"  # a layer's grafts live in its child of this name
MAX_ACTIVATIONS = 1 << 16  # elements of an output that are read
DEAD_SHARE = 0.025
EXTREME_SHARE = 0.01
PATIENCE_CALLS = 64  # how long a frame waits for a step of each optimizer, for accumulation
MAX_SNR = 1e3
WATCHER = "activation watcher"
_NO_ACTIVATIONS = "The layer's activations are not measured."
FIRST_ITERATIONS, NEXT_ITERATIONS = 6, 1
_ACTIVATION_SIGNALS = (Signal.ACT_MEAN, Signal.ACT_STD, Signal.DEAD_FRACTION, Signal.SATURATION)


class HealthSampler:
    """Turns a training loop into health frames.

    Args:
        model: the model as it trains; layer names are its module names.
        optimizers: those that hold its parameters.
        layers: rows of the frames, in this order.
        watch: ``watch(layer, fn)`` calls ``fn(x, y)`` at the layer's next forwards until the
            returned function is called, with the first tensors that go in and come out.
        budget: share of a step that sampling may take in total; half for each tier.
        frame_every, deep_every: shortest periods, in calls of :meth:`step`. They grow while
            the measured cost would exceed the budget.
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
        budget: float = 0.02,
        frame_every: int = 10,
        deep_every: int = 50,
        clock: Callable[[], float] = time.perf_counter,
        fail_closed: FailClosed | None = None,
    ) -> None:
        self._model = model
        self._optimizers = tuple(optimizers)
        self._names = tuple(layer.name for layer in layers)
        self._clock = clock
        self._frames = _Pace(max(1, frame_every), budget)
        self._deep = _Pace(max(1, deep_every), budget)
        closed = fail_closed or FailClosed()
        self._activations = _Activations(watch, self._names, clock, closed)
        self._ranks = _StableRanks()
        self._steps = OptimizerSteps(self._optimizers, clock)
        self._before: list[Tensor] = []
        self._before_fresh = False
        self._deep_now = False
        self._calls = 0
        self._next_frame = self._frames.shortest
        self._last_deep = 0
        self._step_seconds: deque[float] = deque(maxlen=15)
        self._spent = 0.0
        self._elapsed = 0.0
        self._last_exit: float | None = None
        self.refresh()

    @property
    def cost_ratio(self) -> float:
        """Time spent in sampling / time of everything else so far; NaN before the second step."""
        return self._spent / self._elapsed if self._elapsed > 0 else math.nan

    @property
    def period(self) -> int:
        """Present number of steps between frames."""
        return self._frames.period(self._typical_step(), self.cost_ratio)

    @property
    def deep_period(self) -> int:
        """Present number of steps between samples of activations."""
        return self._deep.period(self._typical_step(), self.cost_ratio)

    def refresh(self) -> None:
        """Reads the model's modules again; call it after a graft or an undo."""
        self._map = _ParameterMap.of(self._model, self._names)
        self._held = self._count_held()
        self._before = []
        self._before_fresh = False
        self._steps.forget_weights()

    def close(self) -> None:
        """Removes all watchers from the model, and the hooks from its optimizers."""
        self._activations.disarm()
        self._steps.close()

    def step(
        self, step: int, loss: float | Tensor | None, metrics: Mapping[str, float] | None = None
    ) -> HealthFrame | None:
        """Call once for each training step, anywhere in the loop.

        Args:
            step: the training step's number.
            loss: read only when a frame is due, to avoid waiting for a GPU; None is unknown.
            metrics: more run-wide numbers for the frame.

        Returns:
            A frame when one was due.
        """
        entered = self._clock()
        if self._last_exit is not None:
            self._step_seconds.append(entered - self._last_exit)
            self._elapsed += entered - self._last_exit
        self._calls += 1
        frame = None
        if self._calls >= self._next_frame and not self._waits:
            frame = self._sample(step, loss, metrics or {}, entered)
        elif self._calls == self._next_frame - 1:
            self._prepare(entered)
        self._last_exit = self._clock()
        self._spent += self._last_exit - entered
        return frame

    @property
    def _waits(self) -> bool:
        """The due frame waits for an optimizer: gradients that still accumulate are no result."""
        return self._steps.missing and self._calls < self._next_frame + PATIENCE_CALLS

    def _prepare(self, entered: float) -> None:
        """The step before a frame: keep the weights, arm the watchers."""
        if self._count_held() != self._held:
            self.refresh()
        self._keep_weights()
        columns = zip(self._map.parameters, self._before, strict=True)
        self._steps.measure_next({id(parameter): copy for parameter, copy in columns})
        self._frames.add(self._clock() - entered)
        self._deep_now = self._calls + 1 - self._last_deep >= self.deep_period
        if self._deep_now:
            started = self._clock()
            self._activations.arm()
            self._deep.add(self._clock() - started)

    @torch.no_grad()
    def _sample(
        self, step: int, loss: float | Tensor | None, metrics: Mapping[str, float], entered: float
    ) -> HealthFrame:
        values = np.full((len(self._names), len(SIGNALS)), np.nan, dtype=np.float32)
        self._fill_norms(values)
        self._frames.add(self._clock() - entered + self._steps.seconds)
        # The optimizers' hooks ran inside the user's step: their time counts as sampling.
        self._spent += self._steps.seconds
        self._elapsed -= self._steps.seconds
        if self._deep_now:
            self._fill_deep(values)
        values[:, SIGNAL_INDEX[Signal.HEALTH]] = health_scores(values)
        frame = HealthFrame(
            step=step,
            wall_time=time.time(),
            layers=self._names,
            values=values,
            metrics=self._metrics(loss, metrics),
        )
        self._frames.close()
        self._plan()
        return frame

    def _plan(self) -> None:
        self._deep_now = False
        self._before_fresh = False
        self._next_frame = self._calls + self.period
        if self._next_frame == self._calls + 1:
            self._prepare(self._clock())

    def _keep_weights(self) -> None:
        weights = [parameter.detach() for parameter in self._map.parameters]
        if not self._before:
            self._before = [weight.clone() for weight in weights]
        else:
            torch._foreach_copy_(self._before, weights)
        self._before_fresh = True

    def _fill_norms(self, values: np.ndarray) -> None:
        """Tier 0: what the optimizers' steps measured, and the rest; one transfer for each."""
        self._steps.end()
        measured, parameters = self._steps.norms, self._map.parameters
        weights = [parameter.detach() for parameter in parameters]
        gradient_P = _squares_of(parameters, measured.gradients)
        # A parameter of no optimizer, or of one that made no step.
        gradient_P = _or(gradient_P, [_left(p, measured.gradients) for p in parameters])
        if self._before_fresh and self._before:
            rest = [id(parameter) not in measured.updates for parameter in parameters]
            olds = [
                old if is_left else None for old, is_left in zip(self._before, rest, strict=True)
            ]
            old_P = _or(_squares_of(parameters, measured.old_weights), olds)
            pairs = [(old, new) for old, new in zip(olds, weights, strict=True) if old is not None]
            if pairs:
                # Reuses the copies: they become w_old - w_new.
                torch._foreach_sub_([old for old, _ in pairs], [new for _, new in pairs])
            update_P = _or(_squares_of(parameters, measured.updates), olds)
            _write_update_ratio(values, self._map, update_P, old_P)
        _write_norms(values, self._map, gradient_P, _squared_norms(weights))
        _write_graft_share(values, self._map, gradient_P)

    def _fill_deep(self, values: np.ndarray) -> None:
        """Tier 1: activations, stable rank, gradient SNR."""
        started = self._clock()
        self._activations.disarm()
        self._activations.write(values)
        self._ranks.write(values, self._map)
        _write_snr(values, self._map, self._optimizers)
        self._last_deep = self._calls
        self._deep.add(self._clock() - started + self._activations.seconds)
        # The watchers ran inside the user's step: their time counts as sampling.
        self._spent += self._activations.seconds
        self._elapsed -= self._activations.seconds
        self._deep.close()

    def _metrics(
        self, loss: float | Tensor | None, metrics: Mapping[str, float]
    ) -> dict[str, float]:
        found = dict(metrics)
        if loss is not None:
            value = loss.detach().float().mean().item() if isinstance(loss, Tensor) else float(loss)
            found = {"loss": value, **metrics}
        if self._optimizers:
            found.setdefault("lr", float(self._optimizers[0].param_groups[0]["lr"]))
        if self._step_seconds:
            found.setdefault("step_ms", 1e3 * self._typical_step())
        if self._elapsed > 0:
            found.setdefault("sampling_ratio", self.cost_ratio)
        return found

    def _typical_step(self) -> float:
        return statistics.median(self._step_seconds) if self._step_seconds else math.nan

    def _count_held(self) -> tuple[int, ...]:
        """Changes when a graft adds or removes parameters; far cheaper than walking modules."""
        return tuple(
            len(group["params"])
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        )


class _Pace:
    """Period of a tier: the shortest whose measured cost is within half the budget."""

    def __init__(self, shortest: int, budget: float) -> None:
        self.shortest = shortest
        self._budget = budget
        self._open = 0.0
        self._costs: deque[float] = deque(maxlen=7)

    def add(self, seconds: float) -> None:
        """Part of the current sample's cost."""
        self._open += seconds

    def close(self) -> None:
        """The sample is complete."""
        self._costs.append(self._open)
        self._open = 0.0

    def period(self, step_seconds: float, cost_ratio: float) -> int:
        # The median of at least three samples, because first calls fill caches. Longer periods, at
        # most four times, compensate for the time of first calls and outliers.
        if len(self._costs) < 3 or not step_seconds > 0 or self._budget <= 0:
            return self.shortest
        needed = statistics.median(self._costs) / (self._budget / 2 * step_seconds)
        overdrawn = min(4.0, max(1.0, cost_ratio / self._budget))
        return max(self.shortest, math.ceil(needed * overdrawn))


@dataclass(slots=True)
class _ParameterMap:
    """Which parameters belong to which layer, flat, so that one fused call serves all layers.

    A parameter may belong to several layers (a block and its parts), or to none.
    """

    parameters: list[nn.Parameter]
    layers: int
    host_rows: np.ndarray  # layer of each (layer, host parameter) pair
    host_columns: np.ndarray  # parameter of each pair
    graft_rows: np.ndarray
    graft_columns: np.ndarray
    matrices: dict[int, int] = field(default_factory=dict)  # layer -> parameter: its weight

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str]) -> _ParameterMap:
        modules = dict(model.named_modules())
        columns: dict[int, int] = {}
        parameters: list[nn.Parameter] = []
        host: list[tuple[int, int]] = []
        graft: list[tuple[int, int]] = []
        matrices: dict[int, int] = {}
        for row, name in enumerate(names):
            module = modules.get(name)
            if module is None:
                continue
            largest = 0
            for path, parameter in module.named_parameters():
                if not has_numbers(parameter):
                    continue
                if id(parameter) not in columns:
                    columns[id(parameter)] = len(parameters)
                    parameters.append(parameter)
                column = columns[id(parameter)]
                parts = path.split(".")
                (graft if GRAFT_MARK in parts else host).append((row, column))
                if len(parts) == 1 and parameter.ndim >= 2 and parameter.numel() > largest:
                    largest = parameter.numel()
                    matrices[row] = column
        return cls(parameters, len(names), *_pairs(host), *_pairs(graft), matrices)

    def host_sums(self, per_parameter_P: np.ndarray) -> np.ndarray:
        """float64 [L]: sums over each layer's known host parameters, NaN where none is known."""
        return _sums(per_parameter_P, self.host_rows, self.host_columns, self.layers)

    def graft_sums(self, per_parameter_P: np.ndarray) -> np.ndarray:
        """float64 [L]: the same over each layer's grafts."""
        return _sums(per_parameter_P, self.graft_rows, self.graft_columns, self.layers)


class _Activations:
    """Reads each layer's output once, at the first forward that trains."""

    def __init__(
        self,
        watch: Watch,
        names: Sequence[str],
        clock: Callable[[], float],
        fail_closed: FailClosed,
    ) -> None:
        self._watch = watch
        self._fail_closed = fail_closed
        self._names = names
        self._clock = clock
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Tensor] = {}
        self.seconds = 0.0

    def arm(self) -> None:
        self.disarm()
        self._seen = {}
        self.seconds = 0.0
        for row, name in enumerate(self._names):
            closed = partial(
                self._fail_closed.run, part=WATCHER, layer=name, unmeasured=_NO_ACTIVATIONS
            )
            reader = self._fail_closed.wrap(self._reader(row), **closed.keywords)
            undo = closed(partial(self._watch, name, reader))
            if undo is not None:
                self._undo.append(undo)

    def disarm(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def write(self, values: np.ndarray) -> None:
        if not self._seen:
            return
        rows = list(self._seen)
        columns = [SIGNAL_INDEX[signal] for signal in _ACTIVATION_SIGNALS]
        values[np.ix_(rows, columns)] = _measured(_gather(list(self._seen.values())))

    def _reader(self, row: int) -> Watcher:
        def read(x: Tensor, y: Tensor) -> None:
            # Evaluation runs without gradients: its activations are not those that train.
            if row in self._seen or not torch.is_grad_enabled() or not y.is_floating_point():
                return
            if y.layout is not torch.strided or y.is_nested or y.is_meta:
                raise TypeError(f"{_form_of(y)} has no mean over its units")
            started = self._clock()
            with torch.no_grad():
                self._seen[row] = activation_statistics(y.detach())
            self.seconds += self._clock() - started

        return read


class _StableRanks:
    """Stable rank by power iteration that continues from the vector of the last sample."""

    def __init__(self) -> None:
        self._vectors: dict[int, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def write(self, values: np.ndarray, parameters: _ParameterMap) -> None:
        rows = list(parameters.matrices)
        if not rows:
            return
        ranks = [self._rank(parameters.parameters[parameters.matrices[row]]) for row in rows]
        values[rows, SIGNAL_INDEX[Signal.STABLE_RANK]] = _measured(_gather(ranks))

    def _rank(self, parameter: nn.Parameter) -> Tensor:
        weight = parameter.detach().flatten(1).float()
        key = id(parameter)
        vector = self._vectors.get(key)
        iterations = NEXT_ITERATIONS
        if vector is None or vector.shape != (weight.shape[1],) or vector.device != weight.device:
            vector = torch.randn(weight.shape[1], generator=self._generator).to(weight.device)
            iterations = FIRST_ITERATIONS
        rank, vector = stable_rank(weight, vector, iterations)
        self._vectors[key] = vector
        return rank


def _form_of(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "a nested tensor"
    return "a tensor on the meta device" if tensor.is_meta else f"a tensor of {tensor.layout}"


def activation_statistics(y: Tensor) -> Tensor:
    """float32 [4]: mean, standard deviation, dead fraction, saturation of an output.

    Units are the last axis, or axis 1 of [batch, channels, height, width]; large outputs are
    cut to their first samples. A unit is dead when its mean |h| is at most 2.5 % of the layer's
    (Sokar et al. 2023, tau = 0.025). Outputs within 1 % of the range from the
    largest or smallest value are saturated; for rectified outputs, whose zeros are normal, only
    the largest value counts.
    """
    units_last = y.movedim(1, -1) if y.ndim in (4, 5) else y
    samples = units_last.reshape(-1, units_last.shape[-1] if units_last.ndim else 1)
    h = samples[: max(1, MAX_ACTIVATIONS // max(1, samples.shape[1]))].float()
    if h.numel() == 0:
        return torch.full((4,), math.nan, device=y.device)
    std, mean = torch.std_mean(h, correction=0)
    size = h.abs().mean(0)
    dead = (size <= DEAD_SHARE * size.mean()).float().mean()
    low, high = torch.aminmax(h)
    margin = EXTREME_SHARE * (high - low)
    extreme = (h >= high - margin) | ((h <= low + margin) & (low != 0))
    return torch.stack([mean, std, dead, extreme.float().mean()])


def stable_rank(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """‖W‖²_F / ‖W‖²_2 over its largest possible value, and the leading right singular vector.

    Args:
        weight: float [m, n].
        vector: float [n], where the power iteration starts.
        iterations: of W^T W.
    """
    for _ in range(iterations):
        vector = weight.mT @ (weight @ vector)
        vector = vector / vector.norm().clamp_min(1e-30)
    top = (weight @ vector).square().sum()
    # Before the iteration has converged the top value is too small, hence the 1.
    rank = (weight.square().sum() / top / min(weight.shape)).clamp_max(1.0)
    return torch.where(top == 0, torch.zeros_like(rank), rank), vector


def _write_norms(
    values: np.ndarray, parameters: _ParameterMap, grad_P: np.ndarray, weight_P: np.ndarray
) -> None:
    values[:, SIGNAL_INDEX[Signal.GRAD_NORM]] = np.sqrt(parameters.host_sums(grad_P))
    values[:, SIGNAL_INDEX[Signal.WEIGHT_NORM]] = np.sqrt(parameters.host_sums(weight_P))


def _write_update_ratio(
    values: np.ndarray, parameters: _ParameterMap, update_P: np.ndarray, old_P: np.ndarray
) -> None:
    # A frozen parameter has no update; 0 would look like a problem.
    frozen_P = np.array([not parameter.requires_grad for parameter in parameters.parameters])
    update_L = parameters.host_sums(np.where(frozen_P, np.nan, update_P))
    old_L = parameters.host_sums(np.where(frozen_P, np.nan, old_P))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_L = _measured(np.sqrt(update_L / old_L))
    # A layer whose weights are all zero has no ratio; that is unknown, not infinite.
    unknown_L = np.isnan(update_L) | (old_L == 0)
    values[:, SIGNAL_INDEX[Signal.UPDATE_RATIO]] = np.where(unknown_L, np.nan, ratio_L)


def _write_graft_share(values: np.ndarray, parameters: _ParameterMap, grad_P: np.ndarray) -> None:
    graft_L = parameters.graft_sums(grad_P)
    host_L = np.nan_to_num(parameters.host_sums(grad_P))
    with np.errstate(divide="ignore", invalid="ignore"):
        share_L = np.sqrt(graft_L / (graft_L + host_L))
    values[:, SIGNAL_INDEX[Signal.GRAFT_GRAD_SHARE]] = share_L


def _write_snr(
    values: np.ndarray,
    parameters: _ParameterMap,
    optimizers: Iterable[torch.optim.Optimizer],
) -> None:
    """|mean| / std of the gradient from Adam's moments: sqrt(Σm̂² / (Σv̂ - Σm̂²)), at most 1e3.

    Pure noise reads as 0.23 for beta1 = 0.9, because the mean is one of about 19 steps.
    """
    first, second = _adam_moments(parameters, optimizers)
    if first is None or second is None:
        return
    mean_L, power_L = parameters.host_sums(first), parameters.host_sums(second)
    noise_L = np.maximum(power_L - mean_L, power_L / MAX_SNR**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        snr_L = np.sqrt(mean_L / noise_L)
    values[:, SIGNAL_INDEX[Signal.GRAD_SNR]] = np.where(power_L > 0, snr_L, np.nan)


def _adam_moments(
    parameters: _ParameterMap, optimizers: Iterable[torch.optim.Optimizer]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Σm̂² and Σv̂ of each parameter, NaN where no Adam trains it; None if there is no Adam."""
    columns = {id(parameter): i for i, parameter in enumerate(parameters.parameters)}
    means: list[Tensor | None] = [None] * len(columns)
    powers: list[Tensor | None] = [None] * len(columns)
    scale_m = np.full(len(columns), np.nan)
    scale_v = np.full(len(columns), np.nan)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                column = columns.get(id(parameter))
                if column is None or "exp_avg" not in state or "exp_avg_sq" not in state:
                    continue
                beta1, beta2 = group["betas"]
                age = float(state["step"])
                means[column], powers[column] = state["exp_avg"], state["exp_avg_sq"]
                scale_m[column] = 1.0 / (1.0 - beta1**age) ** 2
                scale_v[column] = 1.0 / (1.0 - beta2**age)
    if all(mean is None for mean in means):
        return None, None
    return _squared_norms(means) * scale_m, _norms(powers, 1.0) * scale_v


def _squared_norms(tensors: Sequence[Tensor | None]) -> np.ndarray:
    squares: np.ndarray = np.square(_norms(tensors, 2.0))
    return squares


def _norms(tensors: Sequence[Tensor | None], order: float) -> np.ndarray:
    """float64 [P] norms by fused calls, one for each device and dtype; NaN for None."""
    return _to_host(norms_of(tensors, order))


def _squares_of(parameters: Sequence[nn.Parameter], norms: Mapping[int, Tensor]) -> np.ndarray:
    """float64 [P]: squares of measured norms; NaN where there is none."""
    squares: np.ndarray = np.square(_to_host([norms.get(id(p)) for p in parameters]))
    return squares


def _or(known_P: np.ndarray, tensors: Sequence[Tensor | None]) -> np.ndarray:
    """``known_P``, and squared norms of ``tensors`` where it is NaN."""
    if all(tensor is None for tensor in tensors):
        return known_P
    return np.where(np.isnan(known_P), _squared_norms(tensors), known_P)


def _left(parameter: nn.Parameter, measured: Mapping[int, Tensor]) -> Tensor | None:
    return None if id(parameter) in measured else dense(parameter.grad)


def _to_host(norms: Sequence[Tensor | None]) -> np.ndarray:
    """float64 [P] with one transfer for each device and dtype; NaN for None."""
    found = np.full(len(norms), np.nan)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, norm in enumerate(norms):
        if norm is not None:
            groups.setdefault((norm.device, norm.dtype), []).append(i)
    for members in groups.values():
        group = [norm for i in members if (norm := norms[i]) is not None]
        found[members] = _measured(torch.stack(group).double().cpu().numpy())
    return found


def _gather(tensors: Sequence[Tensor]) -> np.ndarray:
    """Small tensors of any device -> one array, with one transfer for each device."""
    if len({tensor.device for tensor in tensors}) == 1:
        return torch.stack(list(tensors)).float().cpu().numpy()
    return np.stack([tensor.float().cpu().numpy() for tensor in tensors])


def _measured(values: np.ndarray) -> np.ndarray:
    """Measured values that are NaN become inf, because NaN means "not measured"."""
    measured: np.ndarray = np.where(np.isnan(values), np.inf, values)
    return measured


def _pairs(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _sums(
    per_parameter_P: np.ndarray, rows: np.ndarray, columns: np.ndarray, layers: int
) -> np.ndarray:
    picked = per_parameter_P[columns]
    known = ~np.isnan(picked)
    total_L = np.bincount(rows[known], weights=picked[known], minlength=layers)
    count_L = np.bincount(rows[known], minlength=layers)
    return np.where(count_L > 0, total_L, np.nan)
