"""What the gradient at a model's output shows of the loss: its kind, its weight and its targets.

Each loss function has a gradient of its own form, whatever computes it.

Shape legend: N rows of a batch, C classes or features, T classes that are tried as the target.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from esper.diagnosis.facts import ClassWeight, LossKind, ModelPass

CLOSE = 1e-3
SOME = 8  # rows
SPREAD = 0.05  # of the targets' probabilities, relative to their mean
LARGEST_TARGET = 1e5  # float32 has no room for decimals of much larger numbers
ROUND = 0.05  # of a target that somebody chose
TARGET_ERROR = 0.05  # of a target that is computed from its gradient
ITEMS, ELEMENTS = 4, 2**22  # of a batch, whose axes are compared


def class_axes(gradient: Tensor) -> Tensor:
    """Along which axes of an output a loss chooses among classes, as its gradient shows.

    The gradient of a softmax and a negative log-likelihood sums to zero over the classes, and that
    of the likelihood alone has one element there that is not zero. Where a script calls ``view`` or
    ``reshape`` in place of ``permute``, that holds for the axis that it made, and for none of the
    output's own.

    Args:
        gradient: of an output with a batch axis and at least two more.

    Returns:
        bool [axes + 1]: of the axes from the second on, and last: the sum is zero over the classes
        of a view that mixes the axes, and over none of the output's own.
    """
    items = min(ITEMS, ELEMENTS // max(1, gradient[0].numel()))
    g = gradient[:items].detach().float()
    own = [_chooses(g, axis) for axis in range(1, g.ndim)]
    mixed = torch.zeros_like(own[0])
    for size in sorted({size for size in g.shape[1:] if size > 1}):
        first, last = g.reshape(len(g), size, -1), g.reshape(len(g), -1, size)
        # An axis that holds whole groups of classes sums to zero as well, and so does a larger view
        # of such groups.
        fits = [
            chooses for chooses, own_size in zip(own, g.shape[1:], strict=True) if own_size <= size
        ]
        is_view = _sums_to_zero(first, 1) | _sums_to_zero(last, 2)
        mixed = mixed | (is_view & ~torch.stack(fits).any())
    return torch.stack([*own, mixed])


def _chooses(g: Tensor, axis: int) -> Tensor:
    chosen = (g != 0).sum(axis)
    one = (chosen <= 1).all() & (chosen.sum() >= SOME) & (g.shape[axis] > 1)
    return one | (_sums_to_zero(g, axis) & (g.shape[axis] > 1))


def _sums_to_zero(g: Tensor, axis: int) -> Tensor:
    sums, sizes = g.sum(axis).abs(), g.abs().sum(axis)
    return (sums <= CLOSE * sizes + 1e-6 * sizes.max()).all() & (sizes.max() > 0)


def with_loss(seen: ModelPass, y_NC: Tensor, g_NC: Tensor, shape: tuple[int, ...]) -> ModelPass:
    """Adds what the gradient shows.

    Args:
        y_NC: float64, the sampled rows of the output.
        g_NC: float64, the gradient of the loss there.
        shape: of the whole output.
    """
    used = g_NC.abs().sum(1) > 0  # a row that the loss ignores has no gradient
    if not used.any() or not bool(g_NC.isfinite().all()):
        return seen
    if g_NC.numel() == math.prod(shape):
        seen = replace(seen, gradient_square=float(g_NC.square().sum()))
    every_row, (y_NC, g_NC) = bool(used.all()), (y_NC[used], g_NC[used])
    if y_NC.shape[1] > 1:
        found = _with_classes(seen, y_NC, g_NC, math.prod(shape[:-1]), every_row)
        if found is not None:
            return found
    return _with_elements(seen, y_NC, g_NC, shape)


def _with_classes(
    seen: ModelPass, y_NC: Tensor, g_NC: Tensor, rows: int, every_row: bool
) -> ModelPass | None:
    """Of a loss whose target is a class for each row; None where it is another loss.

    Args:
        rows: of the whole output.
        every_row: the loss ignores none of those that were sampled.
    """
    # Rows that a loss of rewards leaves out have a reward of zero; the others may be punished.
    normed = seen.log_sum_near_zero or _are_probabilities(y_NC)
    if normed and every_row and len(g_NC) >= SOME and _is_likelihood(-g_NC):
        return replace(seen, loss_kind=LossKind.LIKELIHOOD, loss_scale=float(-g_NC.max()) * rows)
    if _is_likelihood(g_NC):
        return replace(seen, loss_kind=LossKind.LIKELIHOOD, loss_scale=float(-g_NC.min()) * rows)
    sums, sizes = g_NC.sum(1).abs(), g_NC.abs().sum(1)
    # A row that is already right has a gradient of rounding errors.
    if bool((sums < CLOSE * sizes + 1e-6 * sizes.max()).all()):
        if every_row and (found := _with_unusual_sign(y_NC, g_NC, rows)):
            return replace(seen, loss_kind=found[0], loss_scale=found[1])
        return _with_softmax(seen, y_NC, g_NC, rows)
    if _is_softmax_over_rows(y_NC, g_NC):
        return replace(seen, loss_kind=LossKind.OVER_ROWS)
    return None


def _with_softmax(seen: ModelPass, y_NC: Tensor, g_NC: Tensor, rows: int) -> ModelPass:
    """Of a gradient whose sum is zero in each row, as behind a softmax."""
    weight = _softmax_weight(y_NC, g_NC)
    targets_NC = torch.softmax(y_NC, 1) - g_NC / weight
    if not bool(((targets_NC - targets_NC.round()).abs() < CLOSE).all()):
        # A row of a small weight would look like one with a target of several classes.
        w_N, weights = _class_weights(y_NC, g_NC)
        if weights:
            seen, weight = replace(seen, class_weights=weights), float(w_N.mean())
            targets_NC = torch.softmax(y_NC, 1) - g_NC / w_N[:, None]
    if not _are_distributions(targets_NC):
        if _are_of_two_softmaxes(y_NC, g_NC):
            return replace(seen, loss_kind=LossKind.TWO_SOFTMAXES)
        return seen  # of rewards, say, or of rows with weights of their own
    classes = targets_NC.argmax(1)
    top, count = _most_frequent(classes)
    return replace(
        seen,
        loss_kind=LossKind.CROSS_ENTROPY,
        loss_scale=weight * rows,
        target_low=float(classes.min()),
        target_high=float(classes.max()),
        cross_entropy=float(_cross_entropy(y_NC, targets_NC)),
        target_class=top,
        target_share=count / len(classes),
        answered_share=float((y_NC.argmax(1) == top).float().mean()),
    )


def _with_elements(
    seen: ModelPass, y_NC: Tensor, g_NC: Tensor, shape: tuple[int, ...]
) -> ModelPass:
    """Of a loss that compares each element with a target."""
    elements = math.prod(shape)
    scaled_NC = g_NC * elements
    for kind, targets in _targets(y_NC, scaled_NC):
        if float(targets.abs().max()) > LARGEST_TARGET:
            continue
        whole = targets.round()
        if bool(((targets - whole).abs() < CLOSE).all()):
            low, high = float(whole.min()), float(whole.max())
            return replace(seen, loss_kind=kind, loss_scale=1.0, target_low=low, target_high=high)
    if found := _other_binary(y_NC, g_NC, elements):
        return replace(seen, loss_kind=found[0], loss_scale=found[1], target_low=0, target_high=1)
    if shape[-1] == 1 and (averaged := _kind_of_averaged(y_NC, scaled_NC)):
        return replace(seen, loss_kind=averaged, loss_scale=1.0, targets_averaged=True)
    if shape[-1] == 1 and (weights := _binary_weights(y_NC, g_NC)):
        return replace(seen, class_weights=weights)
    if math.isnan(seen.gradient_square):
        return seen
    wanted = y_NC - scaled_NC / 2
    return replace(seen, target_low=float(wanted.min()), target_high=float(wanted.max()))


def _kind_of_averaged(y_N1: Tensor, scaled_N1: Tensor) -> LossKind | None:
    """All rows have one target, which nobody chose: the mean of the true ones."""
    if len(y_N1) < 3 or _are_equal(y_N1):
        return None
    wanted, soft = y_N1 - scaled_N1 / 2, torch.sigmoid(y_N1) - scaled_N1
    for kind, targets in ((LossKind.SQUARED, wanted), (LossKind.BINARY_LOGITS, soft)):
        if _are_equal(targets) and not _is_round(float(targets.mean())):
            return kind
    return None


def _with_unusual_sign(y_NC: Tensor, g_NC: Tensor, rows: int) -> tuple[LossKind, float] | None:
    """(kind, weight of a row x rows) of a probability, or of cross-entropy with a minus sign.

    All rows have the same weight; those of rewards do not. Two classes do not show the sign.
    """
    if y_NC.shape[1] < 3 or len(y_NC) < SOME:
        return None
    for sign in (1.0, -1.0):
        if (weight := _probability_weight(y_NC, sign * g_NC)) > 0:
            return LossKind.PROBABILITY, sign * weight * rows
    weight = _softmax_weight(y_NC, -g_NC)
    targets_NC = torch.softmax(y_NC, 1) + g_NC / weight
    whole = (targets_NC - targets_NC.round()).abs() < CLOSE
    if bool(whole.all()) and _are_distributions(targets_NC):
        return LossKind.CROSS_ENTROPY, -weight * rows
    return None


def _targets(y_NC: Tensor, g_NC: Tensor) -> list[tuple[LossKind, Tensor]]:
    """The targets that each mean loss would need for this gradient (times the elements)."""
    found = [
        (LossKind.BINARY_LOGITS, torch.sigmoid(y_NC) - g_NC),
        (LossKind.SQUARED, y_NC - g_NC / 2),
    ]
    if bool(((y_NC > 0) & (y_NC < 1)).all()):
        found.insert(0, (LossKind.BINARY, y_NC - g_NC * y_NC * (1 - y_NC)))
    return found


def _other_binary(y_NC: Tensor, g_NC: Tensor, elements: int) -> tuple[LossKind, float] | None:
    """A binary loss that is a sum, or has a minus sign: (kind, weight of an element x elements)."""
    for weight in (1.0, -1.0, -1.0 / elements):
        for kind, targets in _targets(y_NC, g_NC / weight):
            if kind is LossKind.SQUARED:
                continue
            # Outputs at the ends would look like targets themselves, whatever the gradient is.
            outputs = y_NC if kind is LossKind.BINARY else torch.sigmoid(y_NC)
            inside = (outputs - outputs.round()).abs() > 10 * CLOSE
            whole = (targets - targets.round()).abs() < CLOSE
            if bool(inside.all() and whole.all() and (targets.abs() < 1.5).all()):
                return kind, weight * elements
    return None


def _is_likelihood(g_NC: Tensor) -> bool:
    """One element of each row has a gradient, the same negative number in all of them."""
    used = g_NC != 0
    values = g_NC[used]
    return bool((used.sum(1) == 1).all()) and bool(
        ((values - values[0]).abs() < CLOSE * values[0].abs()).all() and values[0] < 0
    )


def _softmax_weight(y_NC: Tensor, g_NC: Tensor) -> float:
    """The weight w of a row in ``w (softmax(y) - target)``, from a class that is not the target."""
    p_NC = torch.softmax(y_NC, 1)
    others = g_NC > 0
    ratios = (g_NC / p_NC.clamp_min(1e-12))[others & (p_NC > 1e-6)]
    return float(ratios.median()) if len(ratios) else math.nan


def _probability_weight(y_NC: Tensor, g_NC: Tensor) -> float:
    """The weight w of a row in ``-w p[target]`` with p = softmax(y), or NaN for another loss.

    Its gradient is ``w p[t] (p - t)``, lowest at the target. Where all p[t] are equal, it is also
    that of cross-entropy.
    """
    p_NC, target_N1 = torch.softmax(y_NC, 1), g_NC.argmin(1, keepdim=True)
    p_t_N1 = p_NC.gather(1, target_N1)
    if p_t_N1.std() < SPREAD * p_t_N1.mean():
        return math.nan
    t_NC = torch.zeros_like(p_NC).scatter_(1, target_N1, 1.0)
    u_NC = p_t_N1 * (p_NC - t_NC)
    w_N = (u_NC * g_NC).sum(1) / u_NC.square().sum(1).clamp_min(1e-30)
    w, error_N = w_N.median(), (g_NC - w_N[:, None] * u_NC).norm(dim=1)
    fits = bool((error_N <= CLOSE * g_NC.norm(dim=1)).all() and ((w_N - w).abs() < 0.01 * w).all())
    return float(w) if fits and w > 0 else math.nan


def _class_weights(y_NC: Tensor, g_NC: Tensor) -> tuple[Tensor, tuple[ClassWeight, ...]]:
    """(of each row, of each class) of cross-entropy; none of a class where its rows differ."""
    p_NC, target_N = torch.softmax(y_NC, 1), g_NC.argmin(1)
    hot_NC = torch.zeros_like(p_NC).scatter_(1, target_N[:, None], 1.0)
    d_NC = p_NC - hot_NC
    w_N = (g_NC * d_NC).sum(1) / d_NC.square().sum(1).clamp_min(1e-30)
    fits = (g_NC - w_N[:, None] * d_NC).norm(dim=1) <= CLOSE * g_NC.norm(dim=1)
    return w_N, _weights_of(target_N, w_N) if bool(fits.all()) else ()


def _binary_weights(y_N1: Tensor, g_N1: Tensor) -> tuple[ClassWeight, ...]:
    """Of a binary loss of logits with a weight for the rows of class 1, as pos_weight."""
    target_N = (g_N1[:, 0] < 0).long()
    return _weights_of(target_N, g_N1[:, 0] / (torch.sigmoid(y_N1[:, 0]) - target_N))


def _weights_of(target_N: Tensor, w_N: Tensor) -> tuple[ClassWeight, ...]:
    """One weight for each class, in at least two, of which one has several rows."""
    found = []
    for number in sorted(set(target_N.tolist())):
        own = w_N[target_N == number]
        weight = float(own.median())
        if not weight > 0 or bool(((own - weight).abs() > 0.01 * weight).any()):
            return ()
        found.append(ClassWeight(number, len(own), weight))
    return tuple(found) if len(target_N) >= SOME and 1 < len(found) < len(target_N) else ()


def _are_of_two_softmaxes(y_NC: Tensor, g_NC: Tensor) -> bool:
    """The rows of the gradient are those of cross-entropy of ``softmax(y)`` with some class.

    With p = softmax(y), q = softmax(p) and the class t that is
    ``w p (q - t - <p, q - t>)``: each class is tried, and must fit with the same w.
    """
    p_NC = torch.softmax(y_NC, 1)
    d_NTC = torch.softmax(p_NC, 1)[:, None, :] - torch.eye(
        y_NC.shape[1], dtype=y_NC.dtype, device=y_NC.device
    )
    u_NTC = p_NC[:, None, :] * (d_NTC - (p_NC[:, None, :] * d_NTC).sum(2, keepdim=True))
    w_NT = (u_NTC * g_NC[:, None, :]).sum(2) / u_NTC.square().sum(2).clamp_min(1e-30)
    error_NT = (g_NC[:, None, :] - w_NT[:, :, None] * u_NTC).norm(dim=2)
    best_N = error_NT.argmin(1, keepdim=True)
    w_N, error_N = w_NT.gather(1, best_N)[:, 0], error_NT.gather(1, best_N)[:, 0]
    size = float(g_NC.norm(dim=1).max())
    w = w_N.median()
    # With two classes any gradient whose sum is zero fits, but not with the same w.
    return bool(
        w > 0
        and len(y_NC) > 2
        and (error_N <= CLOSE * g_NC.norm(dim=1) + 1e-6 * size).all()
        and ((w_N - w).abs() < 0.01 * w).all()
    )


def _is_softmax_over_rows(y_NC: Tensor, g_NC: Tensor) -> bool:
    """The gradient is that of nll_loss of a softmax over axis 0, with some target in each row.

    It is ``K[c] exp(y[n, c])`` where c is not the target of row n, and lower by the same w there.
    Each row of a contrastive loss has a target of its own, and may have its softmax over the rows.
    """
    if len(y_NC) < SOME or y_NC.shape[1] < 2:
        return False
    e_NC = torch.exp(y_NC - y_NC.amax(0))
    k_NC = torch.where(g_NC > 0, g_NC / e_NC, math.nan)
    k_C = k_NC.nanmedian(0).values
    below_NC = torch.where(k_C.isnan(), -g_NC, k_C * e_NC - g_NC)
    target_N, w_N = below_NC.argmax(1), below_NC.amax(1)
    w = float(w_N.median())
    rest_NC = below_NC.scatter(1, target_N[:, None], 0.0)
    # A class that no row of the batch has gets no gradient.
    return bool(
        w > 0
        and ((w_N - w).abs() < 0.01 * w).all()
        and (rest_NC.abs() < CLOSE * w).all()
        and 1 < len(set(target_N.tolist())) < len(target_N)
    )


def _cross_entropy(y_NC: Tensor, targets_NC: Tensor) -> Tensor:
    return -(targets_NC * torch.log_softmax(y_NC, 1)).sum(1).mean()


def _most_frequent(classes_N: Tensor) -> tuple[int, int]:
    """(class, how many rows have it)."""
    counts = torch.bincount(classes_N)
    return int(counts.argmax()), int(counts.max())


def _are_probabilities(y_NC: Tensor) -> bool:
    return bool((y_NC >= 0).all() and ((y_NC.sum(1) - 1).abs() < CLOSE).all())


def _are_distributions(targets_NC: Tensor) -> bool:
    return bool(((targets_NC > -TARGET_ERROR) & (targets_NC < 1 + TARGET_ERROR)).all())


def _are_equal(values_N1: Tensor) -> bool:
    return float(values_N1.max() - values_N1.min()) < 1e-5 * max(1.0, float(values_N1.abs().max()))


def _is_round(number: float) -> bool:
    """As people choose it, such as 0.9 for the real samples of a GAN; no mean of samples is."""
    return abs(number / ROUND - round(number / ROUND)) < CLOSE
