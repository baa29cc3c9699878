"""Tensors that a script pairs with the model's parameters by itself, which no graft can follow.

A running average that is written by hand keeps a dict of tensors by the parameters' names, or a
list of them in their order, and goes through both at each step. The parameters of a graft are not
in it, so the next step of the script would raise, or pair other tensors.

Where they are those of a part of the model, only this part takes no graft. Masks of pruning are
kept for the matrices alone, or for all that is called a weight.

The same dict or list may be a state that was saved; a dict is then loaded by name, and follows a
graft. An average is the one that changes. What does not change, such as the weights that a penalty
pulls towards, stands in the way of the policy, but not of a script that grafts by itself. It is a
saved state where it was made by ``state_dict``, has the names of buffers, is on another device, or
once it was dropped.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from esper.grafting.tensors.forms import Shape, address_of, shape_of
from esper.grafting.tensors.versions import writes_to

MOST_CANDIDATES = 64
LOOKS = 40  # as long the script's containers are held: a step each, on short steps up to 32
WRITES_OF_COPY = 1
FIRST = 8  # numbers of a tensor that are compared
FEWEST_OF_PART = 3  # tensors: a batch, too, is a list of two
AVERAGE = (
    "the script keeps an average by hand, {} tensors that it pairs with the {} parameters, "
    "and a graft would break the pairs: average a copy of the model instead (copy.deepcopy, "
    "AveragedModel), which gets each graft"
)
LIST = (
    "the script keeps a list of {} tensors in the order of the {} parameters, which a graft "
    "would shift: pair them by name, graft by session.graft, or drop the list"
)
DICT = (
    "the script keeps a dict of {} tensors by the names of the {} parameters, such as the anchors "
    "of a penalty, and would look for the names of a graft in it: graft by session.graft where it "
    "skips names that are not in it, or drop the dict. A saved state is recognised when it is kept "
    "as copy.deepcopy(model.state_dict())"
)
Holder: TypeAlias = dict[str, Tensor] | list[Tensor]


@dataclass(slots=True)
class _Suspect:
    part: str  # of the model; empty: the whole
    holder: Holder
    seen: list[tuple[int, int, tuple[float, ...]]]  # of each tensor: id, writes, some numbers


@dataclass(slots=True)
class _Unchanged:
    part: str
    text: str
    tensors: list[weakref.ref[Tensor]]
    by_name: bool

    @property
    def lives(self) -> bool:
        return all(ref() is not None for ref in self.tensors)


class KeptByHand:
    """Finds the averages of one model that are no modules.

    Attributes:
        awaited: a graft waits for what the looks will show, so there is one in each step.
    """

    def __init__(self) -> None:
        self.awaited = False
        self._reasons: dict[str, str] = {}  # by part
        self._suspects: list[_Suspect] = []
        self._unchanged: list[_Unchanged] = []
        self._replaced: set[str] = set()  # parts: a dict of its names was dropped
        self._looks = 0

    def let_go(self) -> None:
        """Before another search: what the script has dropped meanwhile is no longer held.

        A best state is dropped now and then, for a newer one.
        """
        self._suspects = []
        self._replaced |= {kept.part for kept in self._unchanged if kept.by_name and not kept.lives}

    def search(self, model: nn.Module, tensors: Iterable[Tensor]) -> None:
        """Looks at every object of the process where there are tensors of the right shape.

        Args:
            tensors: all that live in the process.
        """
        self._suspects = [
            _Suspect(part, holder, _tensors(holder)) for part, holder in _pairs(model, tensors)
        ]
        modules = dict(model.named_modules())
        self._unchanged = [
            _unchanged(suspect.part, suspect.holder)
            for suspect in self._suspects
            if not _is_saved_state(suspect.holder, suspect.part, modules[suspect.part])
            and not (isinstance(suspect.holder, dict) and suspect.part in self._replaced)
        ]
        self._looks = 0
        for suspect in self._suspects:
            # A dict may be a saved state: a deep copy or a file writes once to each tensor.
            writes = 0 if isinstance(suspect.holder, list) else WRITES_OF_COPY
            if any(written > writes for _, written, _ in suspect.seen):
                self._note(suspect)

    @property
    def found(self) -> bool:
        """Something is looked at, or was."""
        return bool(self._suspects or self._unchanged)

    @property
    def undecided(self) -> bool:
        """Whether the script writes to what was found is not known yet."""
        return bool(self._suspects)

    def look(self) -> None:
        """Whether the script has written to what was found. A few looks, then it is let go."""
        if not self._suspects:
            return
        self._looks += 1
        for suspect in self._suspects:
            if _tensors(suspect.holder) != suspect.seen:
                self._note(suspect)
        if "" in self._reasons or self._looks >= LOOKS:
            self._suspects = []

    def reason(self, layer: str) -> str:
        """Why this layer takes no graft; empty: no such average of its part is known."""
        return next((r for part, r in self._reasons.items() if is_in(layer, part)), "")

    def reason_for_policy(self, layer: str) -> str:
        """Why nobody but the script itself may graft there."""
        if reason := self.reason(layer):
            return reason
        for kept in self._unchanged:
            if is_in(layer, kept.part) and kept.lives:
                return kept.text
        return ""

    def _note(self, suspect: _Suspect) -> None:
        kind = "dict" if isinstance(suspect.holder, dict) else "list"
        text = AVERAGE.format(f"a {kind} of {len(suspect.holder)}", owner_of(suspect.part))
        self._reasons[suspect.part] = text


def _unchanged(part: str, holder: Holder) -> _Unchanged:
    text = (DICT if isinstance(holder, dict) else LIST).format(len(holder), owner_of(part))
    tensors = list(map(weakref.ref, _values(holder)))
    return _Unchanged(part, text, tensors, isinstance(holder, dict))


def _is_saved_state(holder: Holder, part: str, module: nn.Module) -> bool:
    """A dict that is loaded by name: made by ``state_dict``, or with the names of buffers, or on
    another device, where it could be compared with no parameter."""
    if not isinstance(holder, dict):
        return False
    devices = {p.device for p in module.parameters()}
    if not any(value.device in devices for value in holder.values()):
        return True
    names = [name for name, _ in module.named_buffers()]
    return hasattr(holder, "_metadata") or any(
        name in holder or _join(part, name) in holder for name in names
    )


def is_in(layer: str, part: str) -> bool:
    """Of the whole, the name is empty."""
    return not part or layer == part or layer.startswith(f"{part}.")


def owner_of(part: str) -> str:
    """Whose parameters, in a sentence."""
    return f"{part!r} part's" if part else "model's"


def _pairs(model: nn.Module, tensors: Iterable[Tensor]) -> list[tuple[str, Holder]]:
    """(part, holder) of all containers whose tensors have the form of a part's parameters."""
    others = [tensor for tensor in tensors if type(tensor) is Tensor]
    counts = Counter(map(shape_of, others))
    wanted = {
        part: forms for part, forms in forms_of(model).items() if _shapes(forms[-1]) <= counts
    }
    found = _of_whole(wanted.pop(""), others, counts) if "" in wanted else []
    pairs = [("", holder) for holder in found]
    known = {id(holder) for holder in found}
    if wanted:
        pairs += [(part, holder) for part, holder in _of_parts(wanted) if id(holder) not in known]
    own = _espers([holder for _, holder in pairs])
    return [(part, holder) for part, holder in pairs if id(holder) not in own]


def forms_of(model: nn.Module) -> dict[str, tuple[Mapping[str, Tensor], ...]]:
    """part -> what a container may hold of it; the last is what it holds at least."""
    forms: dict[str, tuple[Mapping[str, Tensor], ...]] = {}
    seen: set[frozenset[int]] = set()
    for part, module in model.named_modules():
        named = dict(module.named_parameters())
        own = frozenset(map(id, named.values()))
        if len(named) < (FEWEST_OF_PART if part else 2) or own in seen:
            continue  # or it is all that is in the module around it
        seen.add(own)
        trained = {name: p for name, p in named.items() if p.requires_grad} or named
        weights = {name: p for name, p in trained.items() if name.endswith("weight")}
        matrices = {name: p for name, p in trained.items() if p.ndim > 1}
        kinds = [named, trained, {**named, **dict(module.named_buffers())}]
        kinds += [kind for kind in (weights, matrices) if len(kind) > 1]
        if part:  # by their names in the model
            kinds += [{_join(part, name): p for name, p in kind.items()} for kind in kinds]
        forms[part] = *kinds, min(kinds, key=len)
    return forms


def _join(part: str, name: str) -> str:
    return f"{part}.{name}" if part else name


def _shapes(named: Mapping[str, Tensor]) -> Counter[Shape]:
    return Counter(map(shape_of, named.values()))


def _of_whole(
    forms: Sequence[Mapping[str, Tensor]],
    others: Sequence[Tensor],
    counts: Counter[Shape],
) -> list[Holder]:
    # Of the shape that the fewest tensors have, so that few containers are looked at.
    shape = min(map(shape_of, forms[-1].values()), key=lambda known: counts[known])
    candidates = [t for t in others if shape_of(t) == shape][:MOST_CANDIDATES]
    return [
        holder
        for holder in (gc.get_referrers(*candidates) if candidates else [])
        if any(_in_order(holder, own) or _by_name(holder, own) for own in forms)
    ]


def _of_parts(
    wanted: Mapping[str, tuple[Mapping[str, Tensor], ...]],
) -> Iterator[tuple[str, Holder]]:
    sizes = {len(own) for forms in wanted.values() for own in forms}
    kinds = (list, dict, OrderedDict)
    for holder in [h for h in gc.get_objects() if type(h) in kinds and len(h) in sizes]:
        first = next(iter(holder.values() if isinstance(holder, dict) else holder), None)
        if type(first) is not Tensor:
            continue
        for part, forms in wanted.items():
            if any(
                _in_order(holder, own, FEWEST_OF_PART) or _by_name(holder, own) for own in forms
            ):
                yield part, holder
                break


def _espers(holders: Sequence[Holder]) -> set[int]:
    """Ids of those that Esper keeps, such as the sampler's list of the weights of the frame before.

    Asked for all at once: each question looks at every object of the process.
    """
    owners = gc.get_referrers(*holders) if holders else []
    own = [owner for owner in owners if type(owner).__module__.startswith("esper.")]
    return set(map(id, gc.get_referents(*own)))


def _in_order(holder: Any, wanted: Mapping[str, Tensor], fewest: int = 2) -> bool:
    if type(holder) is not list or not fewest <= len(holder) == len(wanted):
        return False
    return all(
        _mirrors(value, parameter) and value.is_floating_point() is parameter.is_floating_point()
        for value, parameter in zip(holder, wanted.values(), strict=True)
    )


def _by_name(holder: Any, wanted: Mapping[str, Tensor]) -> bool:
    if type(holder) not in (dict, OrderedDict) or holder.keys() != wanted.keys():
        return False
    return all(_mirrors(holder[name], parameter) for name, parameter in wanted.items())


def _mirrors(value: object, parameter: Tensor) -> bool:
    """It is no parameter of another model, and no view of this one."""
    return (
        type(value) is Tensor
        and shape_of(value) == shape_of(parameter)
        and value.grad_fn is None
        and 0 != address_of(value) != address_of(parameter)
    )


def _tensors(
    holder: Holder,
) -> list[tuple[int, int, tuple[float, ...]]]:
    return [
        (id(value), writes_to(value), _first_numbers(value))
        if isinstance(value, Tensor)
        else (id(value), 0, ())
        for value in _values(holder)
    ]


def _values(holder: Holder) -> list[Any]:
    return list(holder.values() if isinstance(holder, dict) else holder)


def _first_numbers(tensor: Tensor) -> tuple[float, ...]:
    """Only of those whose writes torch does not count; it waits for a GPU."""
    return tuple(tensor.reshape(-1)[:FIRST].tolist()) if tensor.is_inference() else ()
