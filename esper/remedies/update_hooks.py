"""Work inside an optimizer's step, just before and just after the update.

Where a closure computes the gradients inside the step, the work before the update follows the
closure. Everything here fails closed.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.by_identity import WeaklyByIdentity
from esper.fail_closed import contained
from esper.grafting.hooks import after_closure
from esper.sharding import local

Optimizer = torch.optim.Optimizer
Work = Callable[[Optimizer], None]
Change = Callable[[Any, int], Any]


def before_update(optimizers: Sequence[Optimizer], work: Work, unmeasured: str) -> list[Any]:
    """Runs ``work(optimizer)`` when the gradients of a step are complete, before the update.

    Args:
        unmeasured: what is not done where the work fails.

    Returns:
        Handles; their ``remove()`` ends it.
    """
    inside = contained("remedy", unmeasured)(work)

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return after_closure(args, kwargs, lambda: inside(optimizer))

    return [optimizer.register_step_pre_hook(hook) for optimizer in optimizers]


def after_update(optimizers: Sequence[Optimizer], work: Work, unmeasured: str) -> list[Any]:
    """Runs ``work(optimizer)`` after the update. Returns handles, as :func:`before_update`."""
    inside = contained("remedy", unmeasured)(work)

    def hook(optimizer: Optimizer, *_: Any) -> None:
        inside(optimizer)

    return [optimizer.register_step_post_hook(hook) for optimizer in optimizers]


def substitute(
    optimizers: Sequence[Optimizer], key: str, change: Change, unmeasured: str
) -> Callable[[], None]:
    """Replaces one value of each parameter group for the duration of each step.

    Between two steps the groups hold the user's own values, so schedulers, saving and loading work
    as without it. Several changes of one value follow one another.

    Args:
        key: of the groups, such as ``"lr"``; a group without it is left alone.
        change: own value, place of the group in its optimizer -> value during the step.
        unmeasured: what is not done where it fails.

    Returns:
        Ends it.
    """
    ends = [_manager_of(optimizer, unmeasured).add(key, change) for optimizer in optimizers]

    def end() -> None:
        for one in ends:
            one()

    return end


class _Substitutes:
    """The values of one optimizer's groups that differ from the user's during a step."""

    def __init__(self, optimizer: Optimizer, unmeasured: str) -> None:
        self._changes: dict[object, tuple[str, Change]] = {}
        self._own: list[tuple[dict[str, Any], str, Any, Any]] = []
        before_update([optimizer], self._replace, unmeasured)
        (self._last,) = after_update([optimizer], self._put_back, unmeasured)

    def add(self, key: str, change: Change) -> Callable[[], None]:
        token = object()
        self._changes[token] = (key, change)

        def end() -> None:
            self._changes.pop(token, None)
            self._put_back()  # a step that raised has not done it

        return end

    def _replace(self, optimizer: Optimizer) -> None:
        self._put_back()
        if not self._changes:
            return
        # Other hooks after the update, such as that of a graft's optimizer, see the changed values.
        hooks: Any = optimizer._optimizer_step_post_hooks  # an OrderedDict, declared as a dict
        hooks.move_to_end(self._last.id)
        for key, change in self._changes.values():
            for place, group in enumerate(optimizer.param_groups):
                if key in group:
                    own = group[key]
                    group[key] = change(own, place)
                    self._own.append((group, key, own, group[key]))

    def _put_back(self, _: Optimizer | None = None) -> None:
        """In reverse; a value that somebody else has set during the step stays."""
        while self._own:
            group, key, own, changed = self._own.pop()
            if group.get(key) is changed:
                group[key] = own


# By identity: a class of the script may compare as it likes.
_managers: MutableMapping[Optimizer, _Substitutes] = WeaklyByIdentity()


def _manager_of(optimizer: Optimizer, unmeasured: str) -> _Substitutes:
    if optimizer not in _managers:
        _managers[optimizer] = _Substitutes(optimizer, unmeasured)
    return _managers[optimizer]


class ScaledUpdates:
    """Scales the updates of some parameters, whatever their optimizer is.

    A learning rate is a factor of the update, so this is a learning rate of their own, without
    a parameter group of their own. It keeps a copy of these parameters during a step.

    Args:
        only: ids of the parameters.
        factor: of all of an update, or of each element in a shape that fits the parameters.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], only: set[int], factor: float | Tensor
    ) -> None:
        self._only = only
        self._factor = factor
        self._before: dict[int, list[tuple[Tensor, Tensor]]] = {}
        undone = "The layer's learning rate is not changed in such a step."
        self._handles = before_update(optimizers, self._keep, undone)
        self._handles += after_update(optimizers, self._scale, undone)

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._before.clear()

    def _keep(self, optimizer: Optimizer) -> None:
        own = [p for g in optimizer.param_groups for p in g["params"] if id(p) in self._only]
        parts = [local(p.detach()) for p in own if p.grad is not None]
        self._before[id(optimizer)] = [(part, part.clone()) for part in parts]

    @torch.no_grad()
    def _scale(self, optimizer: Optimizer) -> None:
        for present, before in self._before.pop(id(optimizer), ()):
            present.copy_(before.lerp(present, self._factor))
