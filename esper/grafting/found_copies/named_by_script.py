"""What a script looks up by the parameters' names or order, beside averages and saved states.

Rates or histories by name, the stacked members of an ensemble, an average that is kept in buffers
under names of its own, and a list of the parameters of a copy that follows the model: the next line
of the script would look for the parameters of a graft there, and find none. What a graft would end
is refused instead, in words, also to a script that asks for it.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from esper.fail_closed import contained
from esper.grafting.found_copies.kept_by_hand import FEWEST_OF_PART, forms_of, is_in, owner_of
from esper.grafting.found_copies.script_objects import LARGEST, script_objects
from esper.grafting.tensors.forms import Shape, shape_of

BY_NAME = (
    "the script keeps a dict of {} values by the names of the {} parameters, and would look for "
    "the names of a graft in it: make it a collections.defaultdict, or drop it before the graft "
    "and build it anew"
)
IN_BUFFERS = (
    "{} keeps a copy of each of the {} parameters in buffers of its own, and a graft would have "
    "none: average a copy of the model instead (copy.deepcopy, AveragedModel), which gets each "
    "graft"
)
OF_COPY = (
    "the script keeps a {} of the parameters of a copy that gets each graft of the model, and "
    "would not find those of a graft in it: ask the copy for them in each step, or drop it before "
    "the graft"
)
_Form: TypeAlias = tuple[str, type[Any]]  # of the first entry

OUR_REFERENCES = 3  # to what was noted: the list's, the loop's and the question's


class NamedByScript:
    """Finds them among the variables of the script, before each graft.

    What the script makes anew in each step, such as the norms that it logs, is in nobody's way: one
    with the same names was there before, and was dropped. Nor is a list of records.
    """

    def __init__(self) -> None:
        self._noted: list[Mapping[str, Any]] = []
        self._dropped: Counter[_Form] = Counter()  # how many at once

    def note(self, model: nn.Module, objects: Sequence[Any]) -> bool:
        """Remembers what is there now; True: there is something new."""
        names = [name.split(".") for name, _ in model.named_parameters()]
        ends = {".".join(name[place:]) for name in names for place in range(len(name))}
        known = {*map(id, self._noted), *_records(objects)}
        new = [
            found
            for found in objects
            if type(found) in (dict, OrderedDict) and next(iter(found), None) in ends
            if id(found) not in known and not _has_tensors(found)
        ]
        self._noted += new
        return bool(new)

    def let_go(self) -> None:
        """What the script has dropped is not kept alive."""
        if self._noted:
            counts = [sys.getrefcount(found) for found in self._noted]
            noted = list(zip(self._noted, counts, strict=True))
            self._dropped |= Counter(_form(d) for d, n in noted if n <= OUR_REFERENCES)
            self._noted = [d for d, n in noted if n > OUR_REFERENCES]

    @contained("look at the variables of the script", "What it looks up by name is not known.")
    def reason(self, model: nn.Module, layer: str, copies: Iterable[nn.Module]) -> str:
        """Why the layer takes no graft, nobody's; empty: nothing is in its way.

        Args:
            copies: that get each graft of the model.
        """
        forms = {
            (part, tuple(own)): own
            for part, kinds in forms_of(model).items()
            if is_in(layer, part)
            for own in kinds
        }
        wanted = [_Names(part, own) for (part, _), own in forms.items()]
        of_copies = [list(copied.parameters()) for copied in copies]
        noted = set(map(id, self._noted))
        anew = self._dropped.copy()
        objects = list(script_objects())
        records = _records(objects)
        for found in objects:
            kind = type(found)
            text = ""
            if kind in (dict, OrderedDict):
                text = "" if id(found) in records else _of_dict(found, wanted, of_copies)
                if text and id(found) not in noted and not _has_tensors(found):
                    anew[_form(found)] -= 1
                    text = "" if anew[_form(found)] >= 0 else text
            elif kind is list and _is_of_copy(found, of_copies):
                text = OF_COPY.format("list")
            elif issubclass(kind, nn.Module):
                text = _of_module(found, wanted)
            if text:
                return text
        return ""


class _Names:
    """Names of the parameters of a part, without what a script may write otherwise."""

    def __init__(self, part: str, own: Mapping[str, Tensor]) -> None:
        self.part = part
        self.plain = {_plain(name): shape_of(p) for name, p in own.items()}
        self.exact = own.keys()

    @property
    def are_clear(self) -> bool:
        """A dict of them has surely to do with the parameters."""
        return len(self.exact) >= FEWEST_OF_PART or any("." in name for name in self.exact)


def _of_dict(
    found: Mapping[Any, Any], wanted: Sequence[_Names], of_copies: Sequence[Sequence[Tensor]]
) -> str:
    values = list(found.values())
    if _is_of_copy(values, of_copies):
        return OF_COPY.format("dict")
    candidates = [names for names in wanted if len(names.exact) == len(found)]
    if not candidates or any(type(name) is not str for name in found):
        return ""
    if any(issubclass(type(value), nn.Parameter) for value in values):
        return ""
    if all(type(value) is dict and _has_tensors(value) for value in values):
        return ""  # a saved state of an optimizer, as in a checkpoint
    shapes = {_plain(name): _shape_of(value) for name, value in found.items()}
    for names in candidates:
        # With a tensor of the same name and shape it may be a state that was saved.
        same = [
            plain for plain, shape in names.plain.items() if shape and shapes.get(plain) == shape
        ]
        may_be_state = bool(same) and found.keys() == names.exact
        if names.are_clear and shapes.keys() == names.plain.keys() and not may_be_state:
            return BY_NAME.format(len(found), owner_of(names.part))
    return ""


def _of_module(found: nn.Module, wanted: Sequence[_Names]) -> str:
    buffers = vars(found).get("_buffers") or {}
    shapes = [(_plain(name), _shape_of(value)) for name, value in buffers.items()]
    for names in wanted:
        if (
            names.are_clear
            and len(names.exact) <= len(shapes)
            and all(
                any(plain in name and shape == other for name, other in shapes)
                for plain, shape in names.plain.items()
            )
        ):
            return IN_BUFFERS.format(type(found).__name__, owner_of(names.part))
    return ""


def _records(objects: Sequence[Any]) -> set[int]:
    """Ids of the dicts of numbers that are in a list, such as what was logged so far."""
    lists = [found for found in objects if type(found) in (list, deque) and len(found) <= LARGEST]
    return {id(d) for found in lists for d in found if type(d) is dict and not _has_tensors(d)}


def _form(found: Mapping[str, Any]) -> _Form:
    return next((name, type(value)) for name, value in found.items())


def _has_tensors(found: Mapping[Any, Any]) -> bool:
    """No single numbers: a state, an average, or the stacked members of an ensemble."""
    return any(issubclass(type(v), Tensor) and bool(shape_of(v)) for v in found.values())


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name))


def _shape_of(value: Any) -> Shape:
    if issubclass(type(value), Tensor):
        return shape_of(value)
    return value.shape if type(value) is np.ndarray else None


def _is_of_copy(values: Sequence[Any], of_copies: Sequence[Sequence[Tensor]]) -> bool:
    return any(
        len(values) == len(own) and all(a is b for a, b in zip(values, own, strict=True))
        for own in of_copies
    )
