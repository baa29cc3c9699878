"""What one step of a model of tokens shows: which places its targets are, and what it sees of them.

Shape legend: B sequences, T places, V tokens of the vocabulary, N sampled places.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from esper.diagnosis.facts import Ahead, Masked
from esper.grafting.slot import is_transformed

PLACES = 64  # whose targets are compared with the input
TOKENS = 1024  # of a model's input
LAGS = (1, 0, 2)  # the right one first
COMPARED, DIFFERENT = 32, 8  # places, and the tokens among them, that no chance makes equal
ROWS = 64
ROUNDED = 4  # times the distance of 1 to the next number
ELEMENTS = 2**20  # of the outputs that are kept until the backward pass


class FirstPlaces:
    """The first place of each sequence of a batch, along one axis.

    Args:
        tokens: int [B, T], or [T, B] for axis 0.
        outputs: float [B, T, V], in the order of ``tokens``.
        others: what the model got beside them, int or bool of the same shape.
        axis: of the places.
        random: numbers were drawn in the forward pass, as by dropout.
        precision: the coarsest one of the forward pass; a smaller distance is its rounding.
    """

    def __init__(
        self,
        tokens: Tensor,
        outputs: Tensor,
        others: Iterable[Tensor],
        axis: int,
        *,
        random: bool,
        precision: torch.dtype,
    ) -> None:
        rows = max(2, min(ROWS, ELEMENTS // max(1, outputs.shape[-1])))
        self._axis, self._rows, self._random = axis, rows, random
        self._rounding = ROUNDED * torch.finfo(precision).eps
        self._tokens_B = tokens.select(axis, 0)[:rows].clone()
        self._outputs_BV = outputs.select(axis, 0)[:rows].detach().float().clone()
        self._known = [_adds_nothing(other, tokens, axis) for other in others]

    def read(self, gradient: Tensor) -> Tensor:
        """float [4, B]: token, target or -1, loss, distance to the first row with that token."""
        y_BV, x_B = self._outputs_BV, self._tokens_B
        lowest_B, target_B = gradient.select(self._axis, 0)[: self._rows].min(1)
        loss_B = y_BV.logsumexp(1) - y_BV.gather(1, target_B[:, None])[:, 0]
        first_B = (x_B[:, None] == x_B).int().argmax(1)
        distance_B = (y_BV - y_BV[first_B]).norm(dim=1) / y_BV.norm(dim=1).clamp_min(1e-30)
        distance_B = distance_B.where(distance_B > self._rounding, 0.0)
        if self._random:
            distance_B = torch.full_like(distance_B, math.nan)
        target_B = torch.where(lowest_B < 0, target_B, -1)
        for known in self._known:
            target_B = torch.where(known, target_B, -1)
        return torch.stack([x_B.float(), target_B.float(), loss_B, distance_B])


def hidden_by(arguments: Mapping[str, Any]) -> Tensor | None:
    """bool [B, T]: the places that a mask of padding hides, by what its name means in the field.

    ``key_padding_mask`` of torch is true there, or below zero; the ``attention_mask`` of
    transformers is zero there.
    """
    for name in ("key_padding_mask", "src_key_padding_mask", "attention_mask"):
        mask = arguments.get(name)
        # A sharded mask, or another one of its own kind, cannot be put beside plain tokens.
        if type(mask) is not Tensor or mask.ndim != 2 or is_transformed(mask):
            continue
        if name == "attention_mask":
            return None if mask.is_floating_point() else mask == 0
        return mask < 0 if mask.is_floating_point() else mask.bool()
    return None


def masked_of(numbers_2N: Tensor) -> Masked:
    """From the tokens, and 1 where one is hidden."""
    tokens_N, hidden_N = numbers_2N[0], numbers_2N[1] > 0
    hidden, read = tokens_N[hidden_N], tokens_N[~hidden_N]
    return Masked(len(hidden), len(set(hidden.tolist())), len(set(read.tolist())))


def ahead_of(numbers_4B: Tensor) -> Ahead:
    """From what :meth:`FirstPlaces.read` has found.

    Where sequences that begin alike go on differently, a model that has read the first token alone
    gives all of them one answer. The best one is the distribution of their second tokens, and its
    loss the entropy of that: no such model can be below it, not even on what it has memorised.
    """
    kept = numbers_4B[:, numbers_4B[1] >= 0]
    groups: dict[float, list[tuple[float, float, float]]] = {}
    for token, target, loss, distance in kept.T.tolist():
        groups.setdefault(token, []).append((target, loss, distance))
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return Ahead()
    least = sum(len(group) * _entropy(target for target, _, _ in group) for group in several)
    losses = sum(loss for group in several for _, loss, _ in group)
    distances = [distance for group in several for _, _, distance in group]
    return Ahead(max(distances), least - losses, least)


def _entropy(values: Iterable[float]) -> float:
    """In nats."""
    known = list(values)
    shares = [known.count(value) / len(known) for value in set(known)]
    return -sum(share * math.log(share) for share in shares)


def are_tokens(x: Tensor) -> bool:
    """int [batch, places], or the places first."""
    return x.ndim == 2 and x.dtype in (torch.int64, torch.int32) and not is_transformed(x)


def beside(tokens: Tensor, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor] | None:
    """The other arguments with a value for each token; None: the model read more than these."""
    others = [value for value in (*args, *kwargs.values()) if value is not tokens]
    tensors = [value for value in others if isinstance(value, Tensor)]
    if any(value.is_floating_point() or value.shape != tokens.shape for value in tensors):
        return None
    plain = (
        value is None or isinstance(value, bool | int | float | str | Tensor) for value in others
    )
    return tensors if all(plain) else None


def alone(tokens: Tensor, others: Iterable[Tensor]) -> Tensor:
    """The tokens; -1 for each where the model read another sequence too, as a decoder does."""
    for other in others:
        known = _adds_nothing(other, tokens, 0) | _adds_nothing(other, tokens, 1)
        tokens = tokens.where(known, -1)
    return tokens


def _adds_nothing(other: Tensor, tokens: Tensor, axis: int) -> Tensor:
    """bool scalar: a mask, places that are those of each sequence, or the tokens as targets.

    Another sequence, as an encoder reads it, and places that differ say more than the tokens do.
    """
    if other.dtype is torch.bool:
        return torch.ones((), dtype=torch.bool, device=tokens.device)
    later = tokens.shape[axis] - 1
    next_ones = other.narrow(axis, 0, later) == tokens.narrow(axis, 1, later)
    ignored = other < 0
    return (
        ((other == 0) | (other == 1)).all()
        | (other == other.narrow(1 - axis, 0, 1)).all()
        | ((other == tokens) | ignored).all()
        | (next_ones | ignored.narrow(axis, 0, later)).all()
    )


def classes_of(g_NV: Tensor) -> Tensor:
    """float [N]: the class with the lowest gradient, the target of cross-entropy; -1: no target."""
    lowest, classes = g_NV.min(1)
    return torch.where(lowest < 0, classes, -1).float()


def lag_of(tokens: Tensor, targets: Tensor, form: tuple[int, ...]) -> tuple[int, int]:
    """The targets are the tokens so many places later: (how many, along which axis); (-1, -1): no.

    Args:
        tokens: int, those of the input [B, T] or [T, B], flattened, as far as they were sent.
        targets: int [N], of its first N places; below 0 for a place that the loss ignores.
        form: of the input.
    """
    place = torch.arange(len(targets), device="cpu")
    for lag in LAGS:
        for axis, apart, room in _axes(place, form):
            later = place + lag * apart
            compared = (targets >= 0) & (room > lag) & (later < len(tokens))
            wanted = tokens[later[compared]]
            if len(wanted) < COMPARED or len(set(wanted.tolist())) < DIFFERENT:
                continue
            if bool((targets[compared] == wanted).all()):
                return lag, axis
    return -1, -1


def _axes(place: Tensor, form: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
    """(axis, how far apart its neighbours are, places that are left in the sequence)."""
    yield 1, 1, form[1] - place % form[1]
    yield 0, form[1], form[0] - place // form[1]
