"""A hook of Esper, as copies, pickle and the compiler meet it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils.hooks import RemovableHandle

_numbers: dict[str, list[int]] = {}  # by kind of hook, those reserved in this process


class PassingHook:
    """A hook that copies and pickle leave behind, and that compiled code does not contain.

    A copy gets one that does nothing. It is a function of the standard library, so that a pickled
    model loads without Esper. While torch traces, for ``torch.compile`` or ``torch.jit``, the hook
    does nothing either: it is no part of the graph, and splits none. See :func:`apart`, too.

    Args:
        takes: how many arguments torch calls the hook with. It calls one with fewer, without the
            keyword arguments, that another thread or another hook adds or removes at this moment;
            then the hook does nothing. 0: any number will do.
    """

    def __init__(self, hook: Callable[..., Any], takes: int = 0) -> None:
        self._hook = hook
        self._takes = takes

    def __call__(self, *args: Any) -> Any:
        return apart(self._look, *args)

    def _look(self, *args: Any) -> Any:
        return None if len(args) < self._takes else self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def apart(look: Callable[..., Any], *args: Any) -> Any:
    """Calls what looks at the script's tensors, so that no mode of the script sees its operations.

    A dispatch mode counts operations, or keeps their results: selective activation checkpointing
    gives those of the forward pass out again by their order, so one more would shift them.

    Returns:
        The result of ``look``. None without a call while torch traces, and under fake tensors:
        there are no numbers.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    has_gradients = torch.is_grad_enabled()
    try:
        return _without_modes(look, *args)
    finally:
        # An interrupt between torch.no_grad() and its block leaves the gradients off.
        if torch.is_grad_enabled() != has_gradients:
            torch.set_grad_enabled(has_gradients)


def _without_modes(look: Callable[..., Any], *args: Any) -> Any:
    if torch._C._len_torch_function_stack():
        with _no_function_modes():
            return _without_dispatch_modes(look, *args)
    return _without_dispatch_modes(look, *args)


@contextmanager
def _no_function_modes() -> Iterator[None]:
    """Takes off the modes that see each call of torch; the script's default device is left."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if all(isinstance(mode, DeviceContext) for mode in modes):
        yield
        return
    for _ in modes:
        _pop_mode()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for mode in modes:
            _push_mode(mode)  # type: ignore[no-untyped-call]


def _without_dispatch_modes(look: Callable[..., Any], *args: Any) -> Any:
    if not torch._C._len_torch_dispatch_stack():
        return look(*args)
    # Only torch's own modes have a key: those of fake tensors, proxies and functionalization.
    modes = _get_current_dispatch_mode_stack()
    if any(getattr(mode, "_mode_key", None) is not None for mode in modes):
        return None
    with _disable_current_modes():
        return look(*args)


@contextmanager
def hidden_hooks(model: nn.Module) -> Iterator[None]:
    """Takes every :class:`PassingHook` out of the modules within the block."""
    changed: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if any(isinstance(hook, PassingHook) for hook in hooks.values()):
                changed.append((hooks, dict(hooks)))
    try:
        for hooks, before in changed:
            for number, hook in before.items():
                if isinstance(hook, PassingHook):
                    del hooks[number]
        yield
    finally:
        for hooks, before in changed:
            hooks.clear()
            hooks.update(before)


def register_alike(kind: str, module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """A forward hook with keyword arguments, under the number that its kind has at every module.

    torch gives each hook a number of its own. Code that torch 2.10 compiles for one block looks
    for the numbers of that block's hooks, so it fits no other block unless they are the same there.

    Args:
        kind: of the hook; the second of a kind at one module has the kind's second number.
        hook: is called without keyword arguments, too: see :class:`PassingHook`.
    """
    handle = module.register_forward_hook(hook, with_kwargs=True)
    reserved = _numbers.setdefault(kind, [])
    taken = module._forward_hooks.keys() | module._forward_pre_hooks.keys()
    number = next((n for n in reserved if n not in taken), None)
    if number is None:
        reserved.append(handle.id)
        return handle
    places: tuple[dict[int, Any], ...] = module._forward_hooks, module._forward_hooks_with_kwargs
    for hooks in places:
        hooks[number] = hooks.pop(handle.id)  # at the end, where it was
    handle.id = number
    return handle


def after_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], work: Callable[[], object]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Does ``work`` when the gradients of an optimizer's step are complete, before the update.

    A closure computes the gradients inside the step (Lightning trains so), and a pre-step hook runs
    before it; the work then follows the closure. It must not raise.

    Args:
        args, kwargs: what a pre-step hook is given; the first argument is the optimizer.

    Returns:
        What the hook must return.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        work()
        return None

    def then() -> Any:
        result = closure()
        work()
        return result

    if len(args) > 1:
        return (args[0], then, *args[2:]), kwargs
    return args, {**kwargs, "closure": then}


def is_left_behind(hook: Any) -> bool:
    """What a copy has in the place of a :class:`PassingHook`."""
    return isinstance(getattr(getattr(hook, "hook", hook), "__self__", None), nullcontext)
