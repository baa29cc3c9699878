"""Tensors that a script pairs with the model's parameters by itself, which no graft can follow.

A running average that is written by hand keeps a dict of tensors by the parameters' names, or a
list of them in their order, and goes through both at each step. The parameters of a graft are not
in it, so the next step of the script would raise, or pair other tensors.

The same dict or list may be a state that was saved; a dict is then loaded by name, and follows a
graft. An average is the one that changes. A list that does not change, such as the weights that a
penalty pulls towards, stands in the way of the policy, but not of a script that grafts by itself.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from esper.grafting.versions import writes_to

MOST_CANDIDATES = 64
LOOKS = 40  # as long the script's containers are held: a step each, on short steps up to 32
WRITES_OF_COPY = 1
FIRST = 8  # numbers of a tensor that are compared
AVERAGE = (
    "the script keeps an average by hand, {} tensors that it pairs with the model's parameters, "
    "and a graft would break the pairs: average a copy of the model instead (copy.deepcopy, "
    "AveragedModel), which gets each graft"
)
LIST = (
    "the script keeps a list of {} tensors in the order of the model's parameters, which a graft "
    "would shift: pair them by name, graft by session.graft, or drop the list"
)


@dataclass(slots=True)
class _Suspect:
    holder: dict[str, Tensor] | list[Tensor]
    seen: list[tuple[int, int, tuple[float, ...]]]  # of each tensor: id, writes, some numbers


class KeptByHand:
    """Finds the averages of one model that are no modules.

    Attributes:
        reason: why the model takes no graft; empty: no such average is known.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._suspects: list[_Suspect] = []
        self._lists: list[list[weakref.ref[Tensor]]] = []
        self._looks = 0

    def search(self, model: nn.Module, tensors: Iterable[Tensor]) -> None:
        """Looks at every object of the process where there are tensors of the right shape.

        Args:
            tensors: all that live in the process.
        """
        self._suspects = [_Suspect(holder, _tensors(holder)) for holder in _pairs(model, tensors)]
        lists = [s.holder for s in self._suspects if isinstance(s.holder, list)]
        self._lists = [list(map(weakref.ref, holder)) for holder in lists]
        self._looks = 0
        for suspect in self._suspects:
            # A dict may be a saved state: a deep copy or a file writes once to each tensor.
            writes = 0 if isinstance(suspect.holder, list) else WRITES_OF_COPY
            if any(written > writes for _, written, _ in suspect.seen):
                self._note(suspect)

    @property
    def found(self) -> bool:
        """Something is looked at, or was."""
        return bool(self._suspects or self._lists)

    def look(self) -> None:
        """Whether the script has written to what was found. A few looks, then it is let go."""
        if not self._suspects:
            return
        self._looks += 1
        for suspect in self._suspects:
            if _tensors(suspect.holder) != suspect.seen:
                self._note(suspect)
        if self.reason or self._looks >= LOOKS:
            self._suspects = []

    @property
    def reason_for_policy(self) -> str:
        """Why nobody but the script itself may graft."""
        living = [len(refs) for refs in self._lists if all(ref() is not None for ref in refs)]
        return self.reason or (LIST.format(living[0]) if living else "")

    def _note(self, suspect: _Suspect) -> None:
        kind = "dict" if isinstance(suspect.holder, dict) else "list"
        self.reason = AVERAGE.format(f"a {kind} of {len(suspect.holder)}")


def _pairs(model: nn.Module, tensors: Iterable[Tensor]) -> list[dict[str, Tensor] | list[Tensor]]:
    named = dict(model.named_parameters())
    others = [tensor for tensor in tensors if type(tensor) is Tensor]
    if len(named) < 2 or not others:
        return []
    # Of the shape that the fewest tensors have, so that few containers are looked at.
    counts = Counter(tuple(tensor.shape) for tensor in others)
    shape = min((tuple(p.shape) for p in named.values()), key=lambda known: counts[known])
    candidates = [t for t in others if tuple(t.shape) == shape][:MOST_CANDIDATES]
    if not candidates:
        return []
    trained = {name: p for name, p in named.items() if p.requires_grad}
    whole = {**named, **dict(model.named_buffers())}
    found = [
        holder
        for holder in gc.get_referrers(*candidates)
        if any(_in_order(holder, own) or _by_name(holder, own) for own in (named, trained, whole))
    ]
    return [holder for holder in found if not _is_espers(holder)]


def _is_espers(holder: object) -> bool:
    """The sampler keeps the weights of the frame before, in a list."""
    owners = gc.get_referrers(holder)
    return any(type(owner).__module__.startswith("esper.") for owner in owners)


def _in_order(holder: Any, wanted: Mapping[str, Tensor]) -> bool:
    if type(holder) is not list or len(holder) != len(wanted):
        return False
    return all(map(_mirrors, holder, wanted.values()))


def _by_name(holder: Any, wanted: Mapping[str, Tensor]) -> bool:
    if type(holder) not in (dict, OrderedDict) or holder.keys() != wanted.keys():
        return False
    return all(_mirrors(holder[name], parameter) for name, parameter in wanted.items())


def _mirrors(value: object, parameter: Tensor) -> bool:
    """It is no parameter of another model, and no view of this one."""
    return (
        type(value) is Tensor
        and value.shape == parameter.shape
        and value.grad_fn is None
        and value.data_ptr() != parameter.data_ptr()
    )


def _tensors(
    holder: dict[str, Tensor] | list[Tensor],
) -> list[tuple[int, int, tuple[float, ...]]]:
    values: list[Any] = list(holder.values() if isinstance(holder, dict) else holder)
    return [
        (id(value), writes_to(value), _first_numbers(value))
        if isinstance(value, Tensor)
        else (id(value), 0, ())
        for value in values
    ]


def _first_numbers(tensor: Tensor) -> tuple[float, ...]:
    """Only of those whose writes torch does not count; it waits for a GPU."""
    return tuple(tensor.reshape(-1)[:FIRST].tolist()) if tensor.is_inference() else ()
