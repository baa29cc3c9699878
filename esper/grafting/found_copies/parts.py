"""Averages and targets of a part of the model, which a graft in that part would break.

A momentum encoder (MoCo, BYOL), a target critic (SAC) or a teacher that stands in the model itself
is written by the script: tensor by tensor in the order of both parts, or from the state of the one
to the other. A graft in one of them shifts or renames its tensors, so the script's next line would
raise or mix different tensors. A copy of the whole model follows its grafts; a part's does not.

Two parts that both train and are near to each other began as copies, or a penalty holds them
together. The script may pair their tensors, so nobody but the script itself grafts there.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from esper.grafting.optimizers import parameters_of
from esper.grafting.slot import SLOT_NAME
from esper.grafting.tensors.forms import shape_of
from esper.grafting.tensors.versions import writes_to

NEAR = 0.5  # of a part's norm; independent weights of the same size are some 1.4 away
MOST_COPIES = 256  # whose numbers are compared
FEWEST_OF_TOWER = 2  # matrices
REASON = (
    "{!r} is copied in {}, as an average or a target, and the script pairs the tensors of both: "
    "a graft would break the pairs. Graft into another layer, or attach the part by itself: "
    "a copy of a whole model gets each graft"
)
TWINS = (
    "{!r} and {} train from the same weights, and the script may pair the tensors of both, which a "
    "graft would shift: graft by session.graft where it does not"
)


class CopiedParts:
    """Finds the copies of parts of one model, in it and beside it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._writes: dict[str, int] = {}  # to each part when the training began
        self._learned: set[str] = set()  # layers
        # No set: a class of the script may compare its modules as it likes.
        self._beside: list[weakref.ref[nn.Module]] = []

    def kinds(self) -> tuple[type[nn.Module], ...]:
        """The classes of the parts."""
        model = self._model()
        parts = () if model is None else _parts(model).values()
        return tuple({type(part) for part in parts})

    def begin(self) -> None:
        """What is written to a part from now on is noticed."""
        model = self._model()
        if model is not None and not self._writes:
            self._writes = {name: _writes_to(part) for name, part in _parts(model).items()}

    def on_gradients(self, layers: Iterable[str]) -> None:
        """These layers had a gradient when the optimizer stepped, which may be gone since."""
        self._learned.update(layers)

    def search(self, living: Sequence[nn.Module]) -> None:
        """Of all modules of the process, keeps those that have the form of a part.

        Their numbers are compared before a graft: to read them here would wait for the device.

        What belongs to another model of this class is no copy of a part: the whole follows, or is
        left alone.
        """
        model = self._model()
        if model is None:
            return
        whole = [m for m in living if type(m) is type(model)]
        inside = {id(part) for one in (model, *whole) for part in one.modules()}
        parts = _parts(model)
        self.begin()
        forms = {_form(part) for part in parts.values()}
        alike = (other for other in living if id(other) not in inside and _form(other) in forms)
        self._beside = [weakref.ref(other) for other in islice(alike, MOST_COPIES)]

    def reason(
        self,
        layer: str,
        optimizers: Sequence[torch.optim.Optimizer],
        run: Iterable[str],
        *,
        by_script: bool = True,
    ) -> str:
        """Why this layer takes no graft; empty: no part that it belongs to is copied.

        Args:
            run: names of the layers that run. A copy inside the model that never runs is a spare
                one, as PEFT keeps of the layers that it trains whole.
            by_script: the script asks for the graft by itself.
        """
        model = self._model()
        if model is None:
            return ""
        learned = self._learned_of(model)
        trained = {id(p) for optimizer in optimizers for p in _trained_by(optimizer, learned)}
        layers = list(run)
        for name in _parts(model):  # the largest first
            if name == layer or layer.startswith(f"{name}."):
                where = next(self._copies(model, name, trained, layers), "")
                if where and self._beside:
                    gc.collect()  # one of an earlier run, which nothing uses, is in nobody's way
                    where = next(self._copies(model, name, trained, layers), "")
                if where:
                    return REASON.format(name, where)
                if twin := "" if by_script else self._twin(model, name, trained, layers):
                    return TWINS.format(name, repr(twin))
        return ""

    def _learned_of(self, model: nn.Module) -> set[int]:
        modules = dict(model.named_modules())
        own = (modules[name] for name in self._learned if name in modules)
        return {id(p) for module in own for p in module.parameters()}

    def _twin(self, model: nn.Module, name: str, trained: set[int], run: Sequence[str]) -> str:
        """Another part that trains and is near to this one; a single matrix is no tower."""
        parts = _parts(model)
        part = parts[name]
        if not _learns(part, trained) or len(_matrices(part)) < FEWEST_OF_TOWER:
            return ""
        return next(
            (
                other_name
                for other_name, other in parts.items()
                if _runs(other_name, run)
                and _stand_apart(model, name, other_name)
                and _learns(other, trained)
                and _is_copy(part, other)
            ),
            "",
        )

    def _copies(
        self, model: nn.Module, name: str, trained: set[int], run: Sequence[str]
    ) -> Iterator[str]:
        parts = _parts(model)
        part = parts[name]
        learns = _learns(part, trained)
        for other_name, other in parts.items():
            if not _runs(other_name, run) or not _stand_apart(model, name, other_name):
                continue
            if _learns(other, trained) is learns:
                continue
            still = other if learns else part
            follows = self._was_written(other_name if learns else name, still)
            if _is_copy(part, other, follows=follows):
                yield repr(other_name)
        for ref in self._beside if learns else ():
            beside = ref()
            if beside is None or not _writes_to(beside) or _learns(beside, trained):
                continue
            if _is_copy(part, beside):
                yield f"another {type(beside).__name__}"

    def _was_written(self, name: str, part: nn.Module) -> bool:
        """No optimizer trains it, and the script has written to it since the start."""
        return _writes_to(part) > self._writes.get(name, sys.maxsize)


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """Those with weights, by name, the larger before the smaller; without slots."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and SLOT_NAME not in name.split(".") and _matrices(module)
    }


def _runs(part: str, layers: Iterable[str]) -> bool:
    return any(f"{layer}.".startswith(f"{part}.") for layer in layers)


def _matrices(module: nn.Module) -> list[Tensor]:
    """Vectors of two layers are often equal: zeros and ones."""
    return [p for p in module.parameters() if p.ndim >= 2 and p.layout is torch.strided]


def _stand_apart(model: nn.Module, name: str, other: str) -> bool:
    """Neither is in the other, nor are they of one stack, whose layers may start as copies."""
    mine, theirs = name.split("."), other.split(".")
    pairs = zip(mine, theirs, strict=False)
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    if len(shared) in (len(mine), len(theirs)):
        return False
    return not isinstance(model.get_submodule(".".join(shared)), nn.ModuleList | nn.Sequential)


def _trained_by(optimizer: torch.optim.Optimizer, learned: set[int]) -> list[Tensor]:
    """Of the tensors that it holds, those that had a gradient, as far as that is known.

    A script may give ``model.parameters()`` to it, with a target network that is always detached.
    """
    held: list[Tensor] = list(parameters_of(optimizer))
    known = (p for p in held if p.grad is not None or p in optimizer.state or id(p) in learned)
    return list(known) or held


def _learns(module: nn.Module, trained: set[int]) -> bool:
    own = (p for p in module.parameters() if p.requires_grad)
    return any(p.grad is not None or id(p) in trained for p in own)


def _writes_to(module: nn.Module) -> int:
    return sum(writes_to(p) for p in module.parameters())


def _form(module: nn.Module) -> Any:
    return type(module), tuple((name, shape_of(p)) for name, p in module.named_parameters())


def _is_copy(part: nn.Module, other: nn.Module, *, follows: bool = False) -> bool:
    """Another module with the same tensors, by name and shape, and with numbers near to them.

    Args:
        follows: the script writes to one of them, so a slow average may be far from the other.
    """
    if _form(part) != _form(other):
        return False
    pairs = list(zip(part.parameters(), other.parameters(), strict=True))
    if any(a is b or a.is_meta or b.is_meta or not _is_whole(a, b) for a, b in pairs):
        return False
    mine, theirs = _matrices(part), _matrices(other)
    return follows or (_is_near(mine[:1], theirs[:1]) and _is_near(mine, theirs))


def _is_whole(*parameters: Tensor) -> bool:
    """Their numbers are here: not in parts on several ranks, nor quantised."""
    return all(type(parameter.detach()) is Tensor for parameter in parameters)


@torch.no_grad()
def _is_near(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    pairs = [(a.float(), b.to(a.device).float()) for a, b in zip(mine, theirs, strict=True)]
    away = sum(float((a - b).square().sum()) for a, b in pairs)
    sizes = [sum(float(t.square().sum()) for t in each) for each in zip(*pairs, strict=True)]
    return away <= NEAR**2 * max(sizes)
