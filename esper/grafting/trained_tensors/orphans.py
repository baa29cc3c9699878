"""Trainable tensors in none of the optimizers that Esper was given, and what may train them.

Being in no optimizer does not show that a tensor never changes. It may be a view of one flat buffer
that the optimizer holds, have a copy in float32 there (master weights) that is written back after
each step, or be in an optimizer that attach was not given. What cannot be told from what is held is
told by whether the tensor moves; see :class:`Unheld`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from esper.grafting.companions.companion import with_companions
from esper.grafting.optimizers import parameters_of
from esper.grafting.tensors.versions import writes_to
from esper.sharding import local

SILENT_UPDATES = 10  # steps of the session without one of a known optimizer; doubled in vain
CHECKED_EACH = 5  # of these steps


@dataclass(slots=True)
class Unheld:
    """What was seen of tensors in no optimizer, over some steps of an optimizer that is known.

    Attributes:
        moved: something else has changed these.
        still: not changed yet -> a gradient has reached it.
        holders: tensor -> the class of the optimizer that holds it, which Esper was not given.
        foreign_idle: what the known optimizers hold beside the model's tensors had no gradient in
            the first update, and got no state.
    """

    moved: set[nn.Parameter] = field(default_factory=set)
    still: dict[nn.Parameter, bool] = field(default_factory=dict)
    holders: dict[nn.Parameter, str] = field(default_factory=dict)
    foreign_idle: bool = False
    _searched_for: set[nn.Parameter] = field(default_factory=set)

    def search(
        self, orphans: Iterable[nn.Parameter], known: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Looks for the optimizers of these; once, as it looks at every object of the process."""
        wanted = set(orphans)
        if not wanted - self._searched_for:
            return
        self._searched_for |= wanted
        found = _holders(wanted, known)
        if found:  # perhaps one of an earlier run, which nothing uses any more
            del found
            gc.collect()
            found = _holders(wanted, known)
        self.holders |= found

    def search_again(self) -> bool:
        """Lets the next search look for these tensors once more; False: it looked for none."""
        looked = bool(self._searched_for)
        self._searched_for.clear()
        return looked


@dataclass(slots=True)
class Orphans:
    """The trainable tensors in none of the known optimizers, by name.

    Attributes:
        untrained: nothing changes these.
        held_elsewhere: class of an optimizer that Esper was not given -> these are in it.
        moved: something unknown changes these.
        undecided: it is not known yet.
        foreign: tensors of the known optimizers that have nothing to do with the model's.
    """

    untrained: list[str] = field(default_factory=list)
    held_elsewhere: dict[str, list[str]] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    foreign: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        own: Mapping[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        unheld: Unheld | None,
    ) -> Orphans:
        """
        Args:
            own: the tensors of the model.
            unheld: None: nobody watches whether they move.
        """
        held = {id(p): p for optimizer in optimizers for p in parameters_of(optimizer)}
        known = {id(p) for p in own.values()}
        others = [p for key, p in held.items() if key not in known]
        buffers = {_address(p) for p in others} - {0}
        whole = {_address(p) for p in own.values()} if others else set()
        found = cls(foreign=[p for p in others if not _address(p) or _address(p) not in whole])
        missing = {
            name: p
            for name, p in own.items()
            # Numbers on the meta device do not exist, so nothing can change them.
            if p.requires_grad and not p.is_meta and id(p) not in held
            if not buffers or _address(p) not in buffers
        }
        if unheld is not None:
            unheld.search(missing.values(), optimizers)
        for name, parameter in missing.items():
            found._sort(name, parameter, unheld)
        return found

    def _sort(self, name: str, parameter: nn.Parameter, unheld: Unheld | None) -> None:
        if unheld is None:
            self.untrained.append(name)
        elif parameter in unheld.holders:
            self.held_elsewhere.setdefault(unheld.holders[parameter], []).append(name)
        elif parameter in unheld.moved:
            self.moved.append(name)
        elif parameter.grad is not None and (unheld.foreign_idle or not self._may_hold(parameter)):
            self.untrained.append(name)
        elif self.foreign and parameter not in unheld.still:
            self.undecided.append(name)  # the optimizer may hold a copy of it
        elif not self.foreign or unheld.still[parameter]:
            self.untrained.append(name)
        # Otherwise the loss is computed from a copy, as by torch.func.functional_call.

    def _may_hold(self, parameter: nn.Parameter) -> bool:
        """What the optimizer holds beside the model's tensors is large enough for a copy of it."""
        return sum(p.numel() for p in self.foreign) >= parameter.numel()


class ReplacedOptimizer:
    """Notices that a script trains with another optimizer than the ones that Esper was given.

    Attributes:
        problem: what happens instead; empty: the known ones train the model.
    """

    def __init__(self, model: nn.Module, known: Sequence[torch.optim.Optimizer]) -> None:
        self._model = model
        self._known = known
        self._seen = 0, 0  # steps of the known ones, and the session's step at which they made it
        self._writes: int | None = None
        self._patience = SILENT_UPDATES
        self.problem = ""

    def on_step(self, step: int, updates: int) -> bool:
        """A step of the session is over; True where :attr:`problem` has changed.

        Args:
            updates: the steps that the known ones have made.
        """
        if updates != self._seen[0] or not self._known:
            had, self.problem = self.problem, ""
            self._seen, self._writes = (updates, step), None
            return bool(had)
        silent = step - self._seen[1]
        if self.problem or silent < self._patience or silent % CHECKED_EACH:
            return False
        before, self._writes = self._writes, sum(map(writes_to, self._model.parameters()))
        if before is None or self._writes == before:
            return False  # gradients are accumulated, or a script only evaluates
        held = {p for optimizer in self._known for p in parameters_of(optimizer)}
        own = {p for p in self._model.parameters() if p in held}
        kinds = sorted(set(_holders(own, with_companions(self._known)).values()))
        if kinds:
            names = " and ".join(dict.fromkeys(type(o).__name__ for o in self._known))
            self.problem = (
                f"{names} made no step since step {self._seen[1]} of the session, and "
                f"{kinds[0]}, which Esper was not given, trains the model"
            )
        else:
            # The script updates by hand. Each search looks at every object of the process.
            self._patience *= 2
        return bool(self.problem)


def _holders(
    wanted: set[nn.Parameter], known: Sequence[torch.optim.Optimizer]
) -> dict[nn.Parameter, str]:
    found: dict[nn.Parameter, str] = {}
    for optimizer in _living_optimizers():
        if not any(optimizer is other for other in known):
            kind = type(optimizer).__name__
            found |= {p: kind for p in parameters_of(optimizer) if p in wanted}
    return found


def _living_optimizers() -> Iterator[torch.optim.Optimizer]:
    for thing in gc.get_objects():
        # isinstance would ask the class of proxies, which may run code of theirs.
        if issubclass(type(thing), torch.optim.Optimizer) and "param_groups" in vars(thing):
            yield thing


def _address(tensor: Tensor) -> int:
    """Of the memory that the tensor is in; 0: it has none that can be asked for."""
    try:
        return local(tensor).untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
