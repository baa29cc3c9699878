"""What a rule may look at. Plain data, without a session, a model or a tensor.

Shape legend: L layers of a frame, S signals, T training losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from esper.contracts import SIGNAL_INDEX, Finding, HealthFrame, LayerInfo, Signal
from esper.diagnosis.facts import (
    Broken,
    Gradients,
    LossKind,
    ModelPass,
    Modes,
    TensorFacts,
    Zeroing,
)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Steps = NDArray[np.int64]

NO_LOSSES: Doubles = np.zeros(0)
NO_STEPS: Steps = np.zeros(0, dtype=np.int64)


SQUARES = 0.01  # distance of their weights from those of a mean
CAME_TRAINED = 0.5  # of the loss of guessing


class Unknown(Exception):
    """A rule needs something that was not measured."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Observation:
    """Everything that is known of a run at one step.

    Attributes:
        step: of the session.
        layers: names of the layers that have run, in the order of execution.
        infos: these layers, as they were seen to run; empty unknown.
        frames: health frames, the newest last.
        loss_steps, losses: int64 [T], float64 [T], of the latest steps.
        first_losses: the first finite ones of the run, float64, also where ``losses`` no longer has
            them; empty: ``losses`` has them.
        rewinds: how often the run went back to earlier weights.
        other_data_since: the step from which on the data or the targets are known to be others
            than before; -1: they are not.
        held_out: (step, held-out loss), the newest last.
        rates: (step, largest learning rate), the newest last.
        ledger: findings of the optimizer's ledger.
        tensors: the parameters before the first update; empty for a run that was resumed.
        symmetric: tensors that started with equal rows, or with the elements of another, and
            still nearly have them.
        frozen, trainable: elements of the parameters now.
        trainable_matrices: how many parameters with two axes or more require a gradient now.
        frozen_layers: layers all of whose parameters are frozen now.
        passes: observed forward passes that trained, the newest last.
        gradients: readings of the gradients, the newest last.
        dropouts: (layer, probability) of each dropout that is on.
        batch_norms: (layer, momentum) of each batch norm that keeps statistics in training mode.
        without_statistics: batch norms that were set to evaluation mode, beside parts that train,
            before they have seen a batch.
        duplicates: pairs of names of one module that a container holds twice.
        rank_digests: one number of each rank's parameters; empty for one process.
        script_writes: the script writes weights between the updates, again and again.
        optimizers: how many train the model.
        searches: an optimizer finds the size of its updates by itself.
        estimates_rate: an optimizer does, and its ``lr`` is a factor of the estimate.
        warms_up: an optimizer may make its first updates at a rate of zero.
        overshoot: how many times larger than a later one the update of the newest reading is.
        update_excess: how many times larger than a sound one an update of the run was; NaN unknown.
        follows_gradient: the updates are as large as the gradient; those of an adaptive optimizer
            are not, so it leaves a place where the gradient is faint.
    """

    step: int = 0
    layers: tuple[str, ...] = ()
    infos: tuple[LayerInfo, ...] = ()
    frames: Sequence[HealthFrame] = ()
    loss_steps: Steps = field(default_factory=lambda: NO_STEPS)
    losses: Doubles = field(default_factory=lambda: NO_LOSSES)
    first_losses: Doubles = field(default_factory=lambda: NO_LOSSES)
    rewinds: int = 0
    other_data_since: int = -1
    held_out: Sequence[tuple[int, float]] = ()
    rates: Sequence[tuple[int, float]] = ()
    ledger: Sequence[Finding] = ()
    tensors: Sequence[TensorFacts] = ()
    symmetric: Sequence[str] = ()
    frozen: int = 0
    trainable: int = 0
    trainable_matrices: int = 0
    frozen_layers: Sequence[str] = ()
    passes: Sequence[ModelPass] = ()
    gradients: Sequence[Gradients] = ()
    zeroing: Zeroing = field(default_factory=Zeroing)
    modes: Modes = field(default_factory=Modes)
    dropouts: Sequence[tuple[str, float]] = ()
    batch_norms: Sequence[tuple[str, float]] = ()
    without_statistics: Sequence[str] = ()
    broken: Broken = field(default_factory=Broken)
    duplicates: Sequence[tuple[str, str]] = ()
    rank_digests: Sequence[float] = ()
    script_writes: bool = False
    optimizers: int = 1
    searches: bool = False
    estimates_rate: bool = False
    warms_up: bool = False
    overshoot: float = 1.0
    update_excess: float = math.nan
    follows_gradient: bool = True

    # -- what rules ask --------------------------------------------------------------------------

    @property
    def loss(self) -> float:
        """The latest training loss.

        Raises:
            Unknown: there is none.
        """
        if not len(self.losses):
            raise Unknown("no training loss was passed to session.step")
        return float(self.losses[-1])

    def squares_in_loss(self, seen: ModelPass) -> float:
        """The weight of each square, times their number: 1 for a mean squared error.

        The gradient of ``w (y - t)^2`` is ``2 w (y - t)``, so the loss of its step is known from
        the gradient but for ``w``. The number of the squares for their sum; below 0 with a minus
        sign. Raises ``Unknown``.
        """
        found = np.flatnonzero(self.loss_steps == seen.step)
        square = seen.gradient_square
        if not len(found) or not square > 0 or not math.isfinite(self.losses[found[0]]):
            raise Unknown("the loss and its whole gradient of one step are not known")
        loss = float(self.losses[found[0]])
        return math.prod(seen.output_shape) * square / (4.0 * loss) if loss else math.nan

    @property
    def is_squared(self) -> bool:
        """Two losses are the mean of the squares that their gradients show. Raises ``Unknown``."""
        weights = [self.squares_in_loss(seen) for seen in self.passes[:2]]
        return len(weights) == 2 and all(abs(weight - 1) < SQUARES for weight in weights)

    @property
    def first_pass(self) -> ModelPass:
        """The first observed forward pass. Raises ``Unknown``."""
        if not self.passes:
            raise Unknown("no forward pass was observed")
        return self.passes[0]

    @property
    def last_pass(self) -> ModelPass:
        """The newest observed forward pass. Raises ``Unknown``."""
        self.first_pass  # noqa: B018  raises where there is none
        return self.passes[-1]

    @property
    def last_gradients(self) -> Gradients:
        """The newest reading. Raises ``Unknown``."""
        if not self.gradients:
            raise Unknown("no gradient was read at an optimizer's step")
        return self.gradients[-1]

    @property
    def last_input_finite(self) -> bool:
        """The model's input was finite in the newest observed pass, as far as is known."""
        return not self.passes or self.passes[-1].input_finite

    @property
    def some_gradient(self) -> bool:
        """A tensor had a gradient above zero in the newest reading. Raises ``Unknown``."""
        return any(row.norm > 0 for row in self.last_gradients.rows)

    def losses_after(self, step: int) -> list[tuple[int, float]]:
        """(step, training loss) of the later steps."""
        begin = int(np.searchsorted(self.loss_steps, step, side="right"))
        steps, losses = self.loss_steps[begin:], self.losses[begin:]
        return list(zip(steps.tolist(), losses.tolist(), strict=True))

    def loss_change_after(self, step: int) -> float:
        """What the update of a step did to the loss, as a share of the loss of that step.

        The newest three losses count; the update could not change that of its own step yet.

        Raises:
            Unknown: no loss after it is known.
        """
        after = [loss for _, loss in self.losses_after(step)[-3:]]
        if not after:
            raise Unknown("what the update did to the loss is not known yet")
        known = self.losses[self.loss_steps <= step]
        before = float(known[-1]) if len(known) else after[0]
        change = float(np.median(after)) - before
        return change / abs(before) if before else math.copysign(math.inf, change)

    def in_ledger(self, slug: str) -> list[Finding]:
        """What the optimizer's ledger says under this rule."""
        return [finding for finding in self.ledger if finding.slug == slug]

    def signal(self, signal: Signal) -> dict[str, float]:
        """Layer -> newest known value.

        Raises:
            Unknown: no frame has a value.
        """
        found: dict[str, float] = {}
        for frame in reversed(self.frames):
            column = frame.values[:, SIGNAL_INDEX[signal]]
            for row in np.flatnonzero(~np.isnan(column)):
                found.setdefault(frame.layers[row], float(column[row]))
        if not found:
            raise Unknown(f"no health frame has the signal {signal}")
        return {name: found[name] for name in self.layers if name in found} or found

    def signal_history(self, signal: Signal) -> list[tuple[int, float]]:
        """(step, median over the layers) of each frame that has the signal."""
        found = []
        for frame in self.frames:
            column = frame.values[:, SIGNAL_INDEX[signal]]
            known = column[np.isfinite(column)]
            if len(known):
                found.append((frame.step, float(np.median(known))))
        return found

    @property
    def update_ratios(self) -> list[tuple[int, float]]:
        """(step, how far the update moved the weights), oldest first.

        From the readings of the gradients, or else from the health frames. Raises ``Unknown``.
        """
        read = [(r.step, r.change) for r in self.gradients if not math.isnan(r.change)]
        known = read or self.signal_history(Signal.UPDATE_RATIO)
        if not known:
            raise Unknown("how far the updates moved the weights was not measured")
        return known

    @cached_property
    def matrices(self) -> tuple[str, ...]:
        """Layers with a weight matrix, in the order of execution."""
        own = {tensor.layer for tensor in self.tensors if tensor.is_matrix}
        return tuple(name for name in self.layers if name in own)

    def layer_norms(self, gradients: Gradients) -> dict[str, float]:
        """Layer -> norm of the gradient of its matrices; layers without one are absent."""
        squares: dict[str, float] = {}
        shapes = {tensor.name: tensor for tensor in self.tensors}
        for row in gradients.rows:
            tensor = shapes.get(row.name)
            if tensor is not None and tensor.is_matrix and not math.isnan(row.norm):
                squares[tensor.layer] = squares.get(tensor.layer, 0.0) + row.norm**2
        return {name: math.sqrt(squares[name]) for name in self.layers if name in squares}

    def finite_losses(self) -> tuple[Steps, Doubles]:
        """Steps and values of the finite training losses.

        Raises:
            Unknown: there is none.
        """
        found = self._finite_losses
        if not len(found[1]):
            raise Unknown("no finite training loss is known")
        return found

    @cached_property
    def _finite_losses(self) -> tuple[Steps, Doubles]:
        """Many rules ask for them."""
        finite = np.isfinite(self.losses)
        if finite.all():
            return self.loss_steps, self.losses
        return self.loss_steps[finite], self.losses[finite]

    @property
    def rate_share(self) -> float:
        """The present learning rate / the largest one so far. Raises ``Unknown``."""
        known = [rate for _, rate in self.rates if math.isfinite(rate)]
        if not known or max(known) <= 0:
            raise Unknown("the learning rate is not known")
        return known[-1] / max(known)

    @property
    def is_warming_up(self) -> bool:
        """The learning rate still rises, as far as it is known."""
        known = [rate for _, rate in self.rates if math.isfinite(rate)]
        return len(known) > 1 and known[-1] > known[-2]

    @cached_property
    def first_training_loss(self) -> float:
        """Median of the first twenty finite ones. Raises ``Unknown``."""
        first = self.first_losses if len(self.first_losses) else self.finite_losses()[1][:20]
        return float(np.median(first))

    @property
    def came_trained(self) -> bool:
        """The model came with trained weights, as the first losses of its classes say."""
        if not self.passes:
            return False
        seen = self.first_pass
        if seen.loss_kind is not LossKind.CROSS_ENTROPY or not 0 < seen.loss_scale < 2:
            return False
        return self.first_training_loss < CAME_TRAINED * math.log(max(2, seen.classes))

    @property
    def learned_share(self) -> float:
        """Median of the newest fifty training losses / that of the first twenty.

        Raises:
            Unknown: there are too few, or the first are not above zero.
        """
        losses = self.finite_losses()[1]
        first = self.first_training_loss
        if len(losses) < 40 or first <= 0:
            raise Unknown("too few losses, or not above zero")
        return float(np.median(losses[-min(50, len(losses) // 2) :])) / first

    def training_loss_at(self, step: int) -> float:
        """Median of the twenty training losses up to a step.

        Raises:
            Unknown: none of them is kept.
        """
        steps, losses = self.finite_losses()
        near = losses[(steps <= step) & (steps > step - 20)]
        if not len(near):
            raise Unknown(f"no training loss of step {step} is kept")
        return float(np.median(near))
