"""Where Esper's parts see the steps of an optimizer: one hook before and one after, shared by all.

A hook of each part costs every step of every run, also while none of them reads anything: on short
steps Python's own calls are most of what watching costs. So a part is only called while it is
armed, and an optimizer's step is otherwise counted and nothing else.

Of a step that ``torch.compile`` compiled with the hooks in it nothing is read: it would be traced
into the script's own code, which then would break and be compiled again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

Call = Callable[[torch.optim.Optimizer], object]


class Updates:
    """The steps of one optimizer; shared by its parts.

    Attributes:
        taken: how many steps it has made since.
        ran_compiled: it has made some in compiled code, which only sets this.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.taken = 0
        self.ran_compiled = False
        self._parts: list[Part] = []
        # Replaced as a whole: a part may be armed by the call of another one.
        self._before: tuple[Call, ...] = ()
        self._after: tuple[Call, ...] = ()
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(_Before(self)),
            optimizer.register_step_post_hook(_After(self)),
        ]

    def _arrange(self) -> None:
        armed = [part for part in self._parts if part.armed]
        self._before = tuple(part.before for part in armed if part.before is not None)
        self._after = tuple(part.after for part in armed if part.after is not None)


class Part:
    """What one part of Esper does at the steps of an optimizer, while it is armed.

    Args:
        before, after: called with the optimizer before and after its step. They must not raise.

    Attributes:
        armed: it is called.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        before: Call | None = None,
        after: Call | None = None,
    ) -> None:
        self.before, self.after = before, after
        self.armed = False
        self._updates = _updates_of(optimizer)
        self._updates._parts.append(self)
        self._since = self._updates.taken

    @property
    def taken(self) -> int:
        """The optimizer's steps since the part was made; compiled ones count once a look."""
        updates = self._updates
        if updates.ran_compiled:
            updates.ran_compiled = False
            updates.taken += 1
        return updates.taken - self._since

    def arm(self, armed: bool = True) -> None:
        """Whether it is called at the next steps."""
        if armed is not self.armed:
            self.armed = armed
            self._updates._arrange()

    def remove(self) -> None:
        """Ends it; the last part takes the hooks out of the optimizer."""
        updates = self._updates
        if self not in updates._parts:
            return
        self.armed = False
        updates._parts.remove(self)
        updates._arrange()
        if not updates._parts:
            for handle in updates._handles:
                handle.remove()


def takes_hooks(optimizer: Any) -> bool:
    """False for a class whose constructor does not call that of ``torch.optim.Optimizer``."""
    return hasattr(optimizer, "_optimizer_step_post_hooks")


class _Before:
    __slots__ = ("updates",)

    def __init__(self, updates: Updates) -> None:
        self.updates = updates

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.updates._before:
            _call(self.updates._before, optimizer)


class _After:
    __slots__ = ("updates",)

    def __init__(self, updates: Updates) -> None:
        self.updates = updates

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        updates = self.updates
        if torch.compiler.is_compiling():
            updates.ran_compiled = True
            return
        updates.taken += 1
        if updates._after:
            _call(updates._after, optimizer)


def _call(calls: tuple[Call, ...], optimizer: torch.optim.Optimizer) -> None:
    has_gradients = torch.is_grad_enabled()
    try:
        for call in calls:
            call(optimizer)
    finally:
        # An interrupt between torch.no_grad() and its block leaves the gradients off.
        torch.set_grad_enabled(has_gradients)


def _updates_of(optimizer: torch.optim.Optimizer) -> Updates:
    hooks = optimizer._optimizer_step_post_hooks.values()
    found = (hook.updates for hook in hooks if isinstance(hook, _After))
    return next(found, None) or Updates(optimizer)
