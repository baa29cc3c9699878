"""What a rule may look at. Plain data, without a session, a model or a tensor.

Shape legend: L layers of a frame, S signals, T training losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper.contracts import SIGNAL_INDEX, Finding, HealthFrame, LayerInfo, Signal

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Steps = NDArray[np.int64]

NO_LOSSES: Doubles = np.zeros(0)
NO_STEPS: Steps = np.zeros(0, dtype=np.int64)


SQUARES = 0.01  # distance of their weights from those of a mean
CAME_TRAINED = 0.5  # of the loss of guessing


class Unknown(Exception):
    """A rule needs something that was not measured."""


class LossKind(StrEnum):
    """The loss function, as its gradient at the model's output shows it."""

    CROSS_ENTROPY = "cross_entropy"  # softmax and negative log-likelihood
    TWO_SOFTMAXES = "cross_entropy of a softmax"
    LIKELIHOOD = "nll_loss"  # the negative output at the target
    PROBABILITY = "nll_loss of a softmax"  # the negative probability of the target
    OVER_ROWS = "nll_loss of a softmax over the rows"  # of the batch
    BINARY = "binary_cross_entropy"  # of probabilities
    BINARY_LOGITS = "binary_cross_entropy_with_logits"
    SQUARED = "mse_loss"  # with targets that are integers; others look like any other loss
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A parameter as it was before the first update.

    Attributes:
        name: as in ``named_parameters``.
        layer: name of its module; kind: class of that module.
        shape: of the tensor.
        trainable: it requires a gradient.
        std: standard deviation of a sample of its elements; 0 for equal ones.
        equal_rows: share of the sampled rows that are equal to the row before; NaN for a vector.
        twin: an earlier tensor of the same shape with equal elements; empty: none.
        all_zero: every sampled element is 0.
        gain: ``std * sqrt(fan_in)``; about 0.6 for torch's ``Linear``; NaN for a vector.
        untrained: it has torch's own first values: a sample of it is uniform, up to the limit that
            they have. One that was trained is not.
    """

    name: str
    layer: str
    kind: str
    shape: tuple[int, ...]
    trainable: bool = True
    std: float = math.nan
    equal_rows: float = math.nan
    twin: str = ""
    all_zero: bool = False
    gain: float = math.nan
    untrained: bool = False

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) >= 2

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class LayerPass:
    """One layer in one forward pass that trained.

    Attributes:
        layer: its name; kind: class of the module.
        input_std: standard deviation of what enters it.
        input_spread: how much the rows of a batch differ: the root mean square of the deviation
            from the batch's mean row, relative to the root mean square of the input.
        input_zeros: share of elements of the input that are exactly 0.
        input_extremes: share of elements of the input within 0.01 of the ends of their range, where
            all are between 0 and 1, as behind a sigmoid, or between -1 and 1, as behind a tanh;
            NaN for another input.
        output_std: standard deviation of what it returns.
        training: the module was in training mode.
        follows: the linear layer whose output enters this linear layer as it is; empty: none.
        values: of a norm over the batch, how many values of each channel it saw; 0 for others.
    """

    layer: str
    kind: str
    input_std: float
    input_spread: float
    input_zeros: float
    input_extremes: float
    output_std: float
    training: bool
    follows: str = ""
    values: int = 0


@dataclass(frozen=True, slots=True)
class ModelPass:
    """The model's own input and output in one forward pass that trained.

    Attributes:
        step: of the session.
        input_rms: root mean square of the first floating-point input; NaN: it has none.
        input_finite: all its sampled elements are finite.
        output_shape: of the first output.
        output_end: name of the function that computed the output, such as ``SoftmaxBackward0``.
        softmax_axis: over which axis of the output a softmax was its last function; None: over
            none that is known.
        row_sum: mean of the sums of the output's rows; NaN unknown.
        output_low, output_high: smallest and largest sampled element of the output.
        output_spread: largest difference between two rows, relative to the output's size.
        log_sum_near_zero: the rows of the output are log-probabilities.
        loss_kind: as the gradient at the output shows it.
        loss_scale: the weight of one row in the loss, times the number of rows: 1 for a mean; below
            0 for a loss of classes with the wrong sign.
        target_low, target_high: smallest and largest sampled target, of cross-entropy the number of
            the class; NaN unknown. Of a loss of an unknown kind: what they are if it is a mean
            squared error.
        gradient_square: sum of the squares of the gradient at the output; NaN where only a part of
            the output was read.
        targets_averaged: the gradient of a mean squared error says that all rows have the same
            target, which is no integer: the mean of the true ones.
        cross_entropy: mean of the sampled rows, where that is the loss.
        target_class, target_share: of cross-entropy the most frequent class of the sampled rows,
            and its share; -1 and NaN unknown.
        answered_share: share of the rows for which the model's answer is that class.
        lag: of a model of sequences of tokens, the targets are the model's own input so many places
            later, in all sampled rows; -1: they are not, or nobody knows.
        layers: in the order of execution.
    """

    step: int
    layers: tuple[LayerPass, ...] = ()
    input_rms: float = math.nan
    input_finite: bool = True
    output_shape: tuple[int, ...] = ()
    output_end: str = ""
    softmax_axis: int | None = None
    row_sum: float = math.nan
    output_low: float = math.nan
    output_high: float = math.nan
    output_spread: float = math.nan
    log_sum_near_zero: bool = False
    loss_kind: LossKind = LossKind.UNKNOWN
    loss_scale: float = math.nan
    target_low: float = math.nan
    target_high: float = math.nan
    targets_averaged: bool = False
    cross_entropy: float = math.nan
    target_class: int = -1
    target_share: float = math.nan
    answered_share: float = math.nan
    lag: int = -1
    gradient_square: float = math.nan

    @property
    def classes(self) -> int:
        """Size of the output's last axis; 0 unknown."""
        return self.output_shape[-1] if self.output_shape else 0

    @property
    def guessing_loss(self) -> float:
        """Mean cross-entropy of equal chances for all classes; NaN where the loss is another."""
        if self.loss_kind is not LossKind.CROSS_ENTROPY or not 0 < self.loss_scale < 2:
            return math.nan
        return math.log(max(2, self.classes))


@dataclass(frozen=True, slots=True)
class GradientRow:
    """The gradient of one parameter at the end of an optimizer's step.

    Attributes:
        name: of the parameter.
        norm: L2; NaN: there is none (``grad is None``).
        dead_rows: share of its sampled rows that were exactly 0 in this reading and in the
            three before; NaN for a vector.
        weight_norm: L2 norm of the parameter.
        change: how far the optimizer's step moved a sample of a matrix, relative to its size; NaN
            for a vector, and for elements that were all 0.
        rate: the learning rate of its group in this step; NaN unknown.
    """

    name: str
    norm: float
    dead_rows: float = math.nan
    weight_norm: float = math.nan
    change: float = math.nan
    rate: float = math.nan


class UpdateSettings(NamedTuple):
    """What the optimizers were set to in an update, remedies included.

    Attributes:
        decay: share of the weights that the weight decay takes in one update, once momentum has
            built up; of optimizers that apply it to the weights, or whose updates follow the
            gradient.
        decay_in_gradient: the weight decay that an adaptive optimizer adds to the gradient, which
            it then divides by its size.
        momentum: of SGD.
        first_beta: of an optimizer whose second beta is smaller.
        eps: what an adaptive optimizer adds to the size of the gradient, by which it divides it.
    """

    decay: float = 0.0
    decay_in_gradient: float = 0.0
    momentum: float = 0.0
    first_beta: float = 0.0
    eps: float = 0.0


@dataclass(frozen=True)
class Gradients:
    """One reading of all gradients.

    Attributes:
        step: of the session.
        readings: how many there were so far, this one too.
        rows: one for each trainable parameter.
        moved: share of the matrices' sampled elements with a gradient that have changed since the
            reading before; NaN at the first.
        rate: the largest learning rate.
        updates: steps of the optimizers since the reading before.
        settings: of the optimizers in this step.
    """

    step: int
    readings: int
    rows: tuple[GradientRow, ...]
    moved: float = math.nan
    rate: float = math.nan
    updates: int = 0
    settings: UpdateSettings = field(default_factory=UpdateSettings)

    @cached_property
    def change(self) -> float:
        """Median over the matrices of how far the step moved them; NaN unknown."""
        known = [row.change for row in self.rows if not math.isnan(row.change)]
        return float(np.median(known)) if known else math.nan


@dataclass(frozen=True, slots=True)
class Zeroing:
    """What the backward passes of each step of the optimizer started from.

    Attributes:
        carried: one for each update: True where the old gradient was there in all of them.
        backwards: backward passes of each of these updates.
        cleared: one for each: each of its several backward passes began at a gradient of zero, and
            the update used the gradient of the last one alone.
    """

    carried: tuple[bool, ...] = ()
    backwards: tuple[int, ...] = ()
    cleared: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Modes:
    """Modules whose result depends on their mode, at an optimizer's step.

    Attributes:
        in_training, in_evaluation: how many; Dropout with p > 0 and normalisation over batches.
        since_step: first of the steps in a row in which all were in evaluation mode.
        updates: how many updates in a row.
        was_training: they have been in training mode before.
        extra_batches: forward passes in training mode beyond those of the updates, as batch norm
            counts them; extra_steps: in so many steps.
        evaluated_in_training: calls of such a module in training mode by ``evaluate``.
    """

    in_training: int = 0
    in_evaluation: int = 0
    since_step: int = 0
    updates: int = 0
    was_training: bool = False
    extra_batches: int = 0
    extra_steps: int = 0
    evaluated_in_training: int = 0


@dataclass(frozen=True, slots=True)
class Broken:
    """Where numbers are not finite, looked up once the loss is not.

    Attributes:
        weights, gradients: names of layers, in the order of execution.
        nothing_counts: there are gradients, and all are exactly zero: the loss is no function of
            the weights, as a mean over no target.
    """

    weights: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    nothing_counts: bool = False


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
        duplicates: pairs of names of one module that a container holds twice.
        rank_digests: one number of each rank's parameters; empty for one process.
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
    zeroing: Zeroing = Zeroing()
    modes: Modes = Modes()
    dropouts: Sequence[tuple[str, float]] = ()
    batch_norms: Sequence[tuple[str, float]] = ()
    broken: Broken = Broken()
    duplicates: Sequence[tuple[str, str]] = ()
    rank_digests: Sequence[float] = ()
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
