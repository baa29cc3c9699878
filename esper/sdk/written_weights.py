"""Whether the script has put other weights into the model: a reset, or an earlier state.

The next fold of a cross-validation, the next round of a federated run, a pruned network that goes
back to its first weights: the loss is high afterwards because the script wants it so. To restore
the weights of before would take back an act of the user.
"""

from __future__ import annotations

import math
import statistics
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from esper.sdk.run_state import LossPoint

WATCHED = 8  # tensors; a reset of the whole model, or of a part that has one of them, is seen
INTERVALS = 16  # between two looks, whose median is the usual rate: an update may be left out
FEWEST_INTERVALS = 4
BEFORE, AFTER = 5, 3  # losses that are compared
RISE = 1.5  # of the loss; a smaller one needs no explanation
FIRST, FAR = 10, 1.5  # losses; nobody wants weights that are far worse than the first ones
NOISE = 6.0  # median differences from step to step
KEPT = 160  # losses, of which the longest idle time has 128
PATIENCE = 5  # steps until these losses have arrived
OFTEN = 3  # times, after which a script is known to write by itself
Place: TypeAlias = tuple[weakref.ref[nn.Module], str]  # a module and the name of its parameter


class WrittenWeights:
    """Counts the writes into a few tensors, which torch does for autograd.

    An update makes the same number of writes each time, so what is beyond it was the script.
    ``parameter.data = …`` counts as one. Writes into ``parameter.data`` are not counted by torch,
    and not seen here.

    Attributes:
        times: how often the script wrote between two updates that come in each step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._watched = _spread(list(_places_of(model)))
        self._addresses: dict[int, int] = {}  # of the numbers of each, by its place
        self._replaced = 0
        self._at = (0, self._writes())
        self._usual: deque[float] = deque(maxlen=INTERVALS)  # writes in a step
        self._first_known, self._highest = 0, 0.0  # of the first losses
        # The script has written after the one step, and up to the other.
        self._between: tuple[int, int] | None = None
        self.times = 0

    def look(self, step: int, losses: Iterable[LossPoint]) -> int:
        """A step is over.

        Args:
            losses: the training losses, the newest last.

        Returns:
            The last step before other weights were put in, and the loss rose with them; -1: none
            were.
        """
        (before, count), now = self._at, self._writes()
        if step <= before:
            return -1
        self._at = (step, now)
        self._learn_first(losses)
        rate, usual = (now - count) / (step - before), self._usual
        if len(usual) >= FEWEST_INTERVALS and rate > statistics.median(usual):
            self._between = (self._between[0] if self._between is not None else before, step)
            self.times += statistics.median(usual) >= len(self._watched)
        usual.append(rate)
        if self._between is None:
            return -1
        after, until = self._between
        found = _jump(list(losses)[-KEPT:], after, until, most=FAR * self._highest)
        if found >= 0 or step >= until + PATIENCE:
            self._between = None
        return found

    def _learn_first(self, losses: Iterable[LossPoint]) -> None:
        if self._first_known < FIRST:
            first = [loss for _, loss in islice(losses, FIRST)]
            self._first_known = len(first)
            self._highest = max((abs(loss) for loss in first if math.isfinite(loss)), default=0.0)

    def forget(self) -> None:
        """Esper itself has written."""
        self._at = (self._at[0], self._writes())

    def _writes(self) -> int:
        writes = 0
        for place, (ref, name) in enumerate(self._watched):
            owner = ref()
            p = None if owner is None else owner._parameters.get(name)
            if p is None or isinstance(p, UninitializedParameter) or p.is_inference():
                continue
            writes += p._version
            if type(p) is nn.Parameter and p.layout is torch.strided:  # others may have no memory
                address = p.data_ptr()
                self._replaced += self._addresses.get(place, address) != address
                self._addresses[place] = address
        return writes + self._replaced


def _jump(losses: list[LossPoint], after: int, until: int, most: float) -> int:
    """The last step before a jump of the loss between the two steps; -1: there is none."""
    known = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    values = [loss for _, loss in known]
    for place in range(AFTER, len(known) - AFTER + 1):
        high = values[place : place + AFTER]
        if not after < known[place][0] <= until or max(high) > most:
            continue
        if _rises(values[:place], high):
            return known[place][0] - 1
    return -1


def _rises(before: list[float], after: list[float]) -> bool:
    """Each of the losses after it is above those just before, and far above their noise."""
    newest = before[-BEFORE:]
    level, lowest = statistics.median(newest), min(after)
    if lowest <= max(newest) or lowest <= level + (RISE - 1.0) * abs(level):
        return False
    noise = statistics.median([abs(b - a) for a, b in pairwise(before[-4 * BEFORE :])])
    return lowest > level + NOISE * noise


def _places_of(model: nn.Module) -> Iterator[Place]:
    """Where each trainable parameter stands, those that are shared once.

    The parameters themselves are not held: a layer that the script replaces would stay in memory.
    Weak references to them would make torch refuse ``torch.utils.swap_tensors``.
    """
    seen: set[int] = set()
    for module in model.modules():
        own: object = module._parameters
        if not isinstance(own, dict):  # TorchScript has another kind
            continue
        for name, parameter in own.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield weakref.ref(module), name


def _spread(places: list[Place]) -> list[Place]:
    count = len(places)
    if count <= WATCHED:
        return places
    return [places[round(place * (count - 1) / (WATCHED - 1))] for place in range(WATCHED)]
