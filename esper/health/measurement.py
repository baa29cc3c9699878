"""One frame's numbers: read on the devices, sent to the host together, and put in their columns.

Everything up to :meth:`Measurement.send` only queues work on the devices. What follows needs the
numbers, which on a GPU have arrived a step later.

Shape legend: L layers, S signals, P parameters of the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.contracts import SIGNAL_INDEX, SIGNALS, HealthFrame, Signal
from esper.health.activations import ACTIVATION_SIGNALS
from esper.health.optimizer_steps import StepNorms, dense, norms_of
from esper.health.parameter_map import ParameterMap
from esper.health.score import health_scores
from esper.health.stable_ranks import StableRanks
from esper.health.transfers import HostTransfer

MAX_SNR = 1e3


@dataclass(slots=True)
class Measurement:
    """What was measured at one step, on its way to a frame.

    Attributes:
        step: where it was measured; the frame may be complete a step later.
        metrics: run-wide numbers that are known on the host.
        numbers: what is on its way from the devices, by name.
        no_step: one for each parameter: its optimizer has made no step. Where it has changed all
            the same, the script updates by hand; where not, there was no update to measure.
    """

    step: int
    names: tuple[str, ...]
    parameters: ParameterMap
    metrics: dict[str, float]
    wall_time: float = field(default_factory=time.time)
    numbers: HostTransfer = field(default_factory=HostTransfer)
    no_step: Sequence[bool] = ()
    _activation_rows: list[int] = field(default_factory=list)
    _moments: Moments | None = None

    # -- on the devices ------------------------------------------------------------------------

    def add_metric(self, name: str, value: float | Tensor | None) -> None:
        """A number, or a tensor that holds one or has a mean; None is not known."""
        if isinstance(value, Tensor):
            number = value.detach()
            number = number.float().mean() if number.numel() != 1 else number.reshape(())
            self.numbers.add(f"metric {name}", [number])
        elif value is not None:
            self.metrics[name] = float(value)

    def add_norms(self, measured: StepNorms, before: Sequence[Tensor]) -> None:
        """Norms of gradients, weights and updates.

        Args:
            measured: by the optimizers' hooks; what they could not read is read here.
            before: copies of the weights before the step, overwritten; empty if there are none.
        """
        parameters = self.parameters.parameters
        # A parameter of no optimizer, or of one that made no step.
        left = norms_of([_left(p, measured.gradients) for p in parameters])
        self._add_merged("gradient", measured.gradients, left)
        self.numbers.add("weight", norms_of([p.detach() for p in parameters]))
        if measured.entries:
            self.numbers.add("entries", [measured.entries.get(id(p)) for p in parameters])
        if before:
            self._add_updates(measured, before)

    def add_deep(
        self,
        activations: Mapping[int, Tensor],
        ranks: StableRanks,
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> None:
        """Activations, stable ranks, and Adam's moments.

        Args:
            activations: row -> values of ``ACTIVATION_SIGNALS``.
        """
        self.add_activations(activations)
        held = self.parameters
        if held.matrices:
            columns = held.matrices.values()
            self.numbers.add("rank", ranks.of([held.parameters[column] for column in columns]))
        self.add_moments(Moments.of(held, optimizers))

    def add_activations(self, activations: Mapping[int, Tensor]) -> None:
        """Row -> values of ``ACTIVATION_SIGNALS``."""
        self._activation_rows = list(activations)
        if activations:
            self.numbers.add("activations", list(activations.values()))

    def add_moments(self, moments: Moments | None) -> None:
        """Adam's moments; None if there is no Adam."""
        self._moments = moments
        if moments is not None:
            moments.add_to(self.numbers)

    def send(self) -> bool:
        """Nothing is added any more. True: the numbers arrive later, so ask a step later."""
        self.numbers.start()
        return self.numbers.is_late

    def _add_updates(self, measured: StepNorms, before: Sequence[Tensor]) -> None:
        parameters = self.parameters.parameters
        unread = [id(p) not in measured.updates for p in parameters]
        self.no_step = [id(p) in measured.no_step for p in parameters]
        olds = [old if rest else None for old, rest in zip(before, unread, strict=True)]
        self._add_merged("old weight", measured.old_weights, norms_of(olds))
        pairs = [
            (old, p.detach()) for old, p in zip(olds, parameters, strict=True) if old is not None
        ]
        if pairs:
            # Reuses the copies: they become w_old - w_new.
            torch._foreach_sub_([old for old, _ in pairs], [new for _, new in pairs])
        self._add_merged("update", measured.updates, norms_of(olds))

    def _add_merged(
        self, name: str, measured: Mapping[int, Tensor], left: Sequence[Tensor | None]
    ) -> None:
        pairs = zip(self.parameters.parameters, left, strict=True)
        self.numbers.add(name, [measured.get(id(p), norm) for p, norm in pairs])

    # -- on the host ---------------------------------------------------------------------------

    def frame(self) -> HealthFrame:
        """The frame; waits for numbers that have not arrived."""
        values = np.full((len(self.names), len(SIGNALS)), np.nan, dtype=np.float32)
        with np.errstate(over="ignore"):  # a square may overflow: it is reported as inf
            self._write_norms(values)
            self._write_updates(values)
        self._write_deep(values)
        values[:, SIGNAL_INDEX[Signal.HEALTH]] = health_scores(values)
        for name in self.numbers.names("metric "):
            self.metrics[name.removeprefix("metric ")] = self._scalar(name)
        return HealthFrame(
            step=self.step,
            wall_time=self.wall_time,
            layers=self.names,
            values=values,
            metrics=self.metrics,
        )

    def _scalar(self, name: str) -> float:
        return float(self.numbers.take(name, not_a_number=np.nan)[0])

    def _write_norms(self, values: np.ndarray) -> None:
        held = self.parameters
        gradient_P = np.square(self.numbers.take("gradient"))
        weight_P = np.square(self.numbers.take("weight"))
        _write(values, Signal.GRAD_NORM, np.sqrt(held.host_sums(gradient_P)))
        _write(values, Signal.WEIGHT_NORM, np.sqrt(held.host_sums(weight_P)))
        graft_L = held.graft_sums(gradient_P)
        host_L = np.nan_to_num(held.host_sums(gradient_P))
        with np.errstate(divide="ignore", invalid="ignore"):
            _write(values, Signal.GRAFT_GRAD_SHARE, np.sqrt(graft_L / (graft_L + host_L)))
        if "entries" in self.numbers:
            entries_P = self.numbers.take("entries")
            sizes_P = np.where(np.isnan(entries_P), np.nan, held.sizes_P)
            zero_L = 1.0 - held.host_sums(entries_P) / held.host_sums(sizes_P)
            _write(values, Signal.GRAD_ZERO_SHARE, np.clip(zero_L, 0.0, 1.0))

    def _write_updates(self, values: np.ndarray) -> None:
        if "update" not in self.numbers:
            return
        held = self.parameters
        # A frozen parameter has no update; 0 would look like a problem.
        frozen_P = np.array([not p.requires_grad for p in held.parameters], dtype=bool)
        update_P = np.square(self.numbers.take("update"))
        if len(self.no_step):
            update_P[np.asarray(self.no_step, dtype=bool) & (update_P == 0)] = np.nan
        old_P = np.square(self.numbers.take("old weight"))
        update_L = held.host_sums(np.where(frozen_P, np.nan, update_P))
        old_L = held.host_sums(np.where(frozen_P, np.nan, old_P))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio_L = np.sqrt(update_L / old_L)
        ratio_L = np.where(np.isnan(ratio_L), np.inf, ratio_L)
        # A layer whose weights are all zero has no ratio; that is unknown, not infinite.
        unknown_L = np.isnan(update_L) | (old_L == 0)
        _write(values, Signal.UPDATE_RATIO, np.where(unknown_L, np.nan, ratio_L))

    def _write_deep(self, values: np.ndarray) -> None:
        if self._activation_rows:
            columns = [SIGNAL_INDEX[signal] for signal in ACTIVATION_SIGNALS]
            values[np.ix_(self._activation_rows, columns)] = self.numbers.take("activations")
        if "rank" in self.numbers:
            rows = list(self.parameters.matrices)
            values[rows, SIGNAL_INDEX[Signal.STABLE_RANK]] = self.numbers.take("rank")
        if self._moments is not None:
            ratio_L = self._moments.signal_to_noise(self.numbers, self.parameters)
            _write(values, Signal.GRAD_SNR, ratio_L)


@dataclass(slots=True)
class Moments:
    """Adam's moments of each parameter: |mean| / std of the gradient, from its own buffers."""

    means: list[Tensor | None]
    powers: list[Tensor | None]
    ages: list[Tensor | None]  # steps, where they are a tensor
    known_ages_P: np.ndarray
    betas_P2: np.ndarray

    @classmethod
    def of(
        cls, parameters: ParameterMap, optimizers: Iterable[torch.optim.Optimizer]
    ) -> Moments | None:
        """None if there is no Adam."""
        columns = {id(parameter): i for i, parameter in enumerate(parameters.parameters)}
        found = cls.empty(len(columns))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    column = columns.get(id(parameter))
                    state = optimizer.state.get(parameter, {})
                    if column is not None and {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
                        found.keep(column, state, group)
        return found if found.is_known else None

    @classmethod
    def empty(cls, count: int) -> Moments:
        """Of ``count`` parameters, of which nothing is known yet."""
        return cls(
            [None] * count,
            [None] * count,
            [None] * count,
            np.full(count, np.nan),
            np.full((count, 2), np.nan),
        )

    @property
    def is_known(self) -> bool:
        """There is an Adam that has made a step."""
        return any(mean is not None for mean in self.means)

    def keep(self, column: int, state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
        """One parameter's state in its optimizer, and its group."""
        betas = group.get("betas")
        if not isinstance(betas, tuple | list) or any(isinstance(beta, Tensor) for beta in betas):
            return
        self.means[column], self.powers[column] = state["exp_avg"], state["exp_avg_sq"]
        self.betas_P2[column] = betas
        age = state["step"]
        if isinstance(age, Tensor):
            self.ages[column] = age.detach().reshape(())
        else:
            self.known_ages_P[column] = age

    def add_to(self, transfer: HostTransfer) -> None:
        transfer.add("moment mean", norms_of(self.means))
        transfer.add("moment power", norms_of(self.powers, 1.0))
        transfer.add("moment age", self.ages)

    def signal_to_noise(self, transfer: HostTransfer, parameters: ParameterMap) -> np.ndarray:
        """float64 [L]: sqrt(Σm̂² / (Σv̂ - Σm̂²)), at most 1e3.

        Pure noise reads as 0.23 for beta1 = 0.9, because the mean is one of about 19 steps.
        """
        sent_P = transfer.take("moment age")
        age_P = np.where(np.isnan(sent_P), self.known_ages_P, sent_P)
        with np.errstate(divide="ignore", invalid="ignore"):
            first_P, second_P = 1.0 / (1.0 - self.betas_P2.T**age_P)
            mean_L = parameters.host_sums(np.square(transfer.take("moment mean")) * first_P**2)
            power_L = parameters.host_sums(transfer.take("moment power") * second_P)
            noise_L = np.maximum(power_L - mean_L, power_L / MAX_SNR**2)
            ratio_L = np.sqrt(mean_L / noise_L)
        return np.where(power_L > 0, ratio_L, np.nan)


def _left(parameter: Tensor, measured: Mapping[int, Tensor]) -> Tensor | None:
    return None if id(parameter) in measured else dense(parameter.grad)


def _write(values: np.ndarray, signal: Signal, column_L: np.ndarray) -> None:
    values[:, SIGNAL_INDEX[signal]] = column_L
