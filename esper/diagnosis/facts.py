"""What was measured of a model in its training, as plain data: no model and no tensor in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np


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


class Ahead(NamedTuple):
    """What the outputs at the first place say, where the model has read one token.

    Attributes:
        distance: largest relative distance between the outputs of two sequences that begin with the
            same token; NaN: there are no two, or random numbers were drawn.
        gained: how far the loss at the first place is below the lowest that is possible for a model
            that has read that token alone, in nats, summed over the sequences; NaN unknown.
        least: that lowest loss, in nats, summed.
    """

    distance: float = math.nan
    gained: float = math.nan
    least: float = math.nan


UNSEEN = Ahead()


class Masked(NamedTuple):
    """What attention reads of the tokens, in the sampled places."""

    places: int = 0  # that it does not read
    tokens: int = 0  # different ones in these places
    read: int = 0  # different ones in the places that it reads


UNMASKED = Masked()


class ClassWeight(NamedTuple):
    """What the loss multiplies the rows of one class by, in the sampled rows."""

    number: int  # of the class
    rows: int
    weight: float


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
        class_axes: the axes of the output along which the loss chooses among classes, as its
            gradient shows; empty: none is known.
        mixes_axes: the loss chooses among the classes of a view of the output whose rows hold
            elements of several of its rows.
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
        class_weights: where the loss weights the rows by their class: of each sampled class.
        answered_share: share of the rows for which the model's answer is that class.
        lag: of a model of sequences of tokens, the targets are the model's own input so many places
            later, in all sampled rows; -1: they are not, or nobody knows.
        ahead: whether its outputs at the first place depend on later tokens, where it predicts the
            next one.
        masked: what a mask of padding hides; none: no mask was seen.
        layers: in the order of execution.
    """

    step: int
    layers: tuple[LayerPass, ...] = ()
    input_rms: float = math.nan
    input_finite: bool = True
    output_shape: tuple[int, ...] = ()
    output_end: str = ""
    softmax_axis: int | None = None
    class_axes: tuple[int, ...] = ()
    mixes_axes: bool = False
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
    class_weights: tuple[ClassWeight, ...] = ()
    answered_share: float = math.nan
    lag: int = -1
    ahead: Ahead = UNSEEN
    masked: Masked = UNMASKED
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
