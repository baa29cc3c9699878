"""How the input of an earlier layer reaches a graft at a later one.

    scope      the smallest module around both layers, and the model: a forward pass begins and ends
    Source     in the slot of the earlier layer: hands over its input
    Carrier    between the two: holds the input from one layer to the other, and no longer

The branch is computed at the later layer, so nothing is kept for backward that a branch beside one
layer would not keep. An input counts for the forward pass in which it was read: when the pass ends,
also by an exception, it is dropped, so a later layer that is called alone never gets an older one.
Each thread has its own, because the replicas of ``nn.DataParallel`` share one carrier.

Activation checkpointing runs parts of the forward pass again during backward, without the scope.
Both layers must be in one such part, or in none: otherwise the graft is left out of both passes.

Under torch.compile, plain attributes take the place of the threads' entries, because the compiler
traces those. Where only one of the layers is compiled, both kinds are read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

_CHECKPOINT = "torch.utils.checkpoint"


@dataclass(slots=True)
class _Kept:
    """An input, and the circumstances in which it was read."""

    x: Tensor
    version: int
    region: object
    grad: bool


class Carrier:
    """Holds the input of the earlier layer until the later one takes it.

    A copy of the model has carriers of its own; copies and pickles hold no tensor.

    Attributes:
        missed: why the later layer got nothing, a sentence; empty while it got all.
    """

    def __init__(self) -> None:
        self.missed = ""
        # Of compiled code; ``eager`` is what eager code hands to compiled code.
        self.is_open = False
        self.traced: Tensor | None = None
        self.eager: Tensor | None = None
        self._threads: dict[int, _Kept | None] = {}  # an entry: its forward pass is open

    def __reduce__(self) -> tuple[Any, ...]:
        return Carrier, ()

    def begin(self) -> None:
        """A forward pass of the scope begins."""
        self.is_open = True
        if not torch.compiler.is_compiling():
            self._threads[threading.get_ident()] = None

    def end(self) -> None:
        """It is over, or has raised."""
        self.is_open = False
        self.traced = None
        self.eager = None
        if not torch.compiler.is_compiling():
            self._threads.pop(threading.get_ident(), None)

    def keep(self, x: Tensor) -> None:
        """The earlier layer has run on ``x``."""
        if torch.compiler.is_compiling():
            if self.is_open:
                self.traced = x
            return
        thread = threading.get_ident()
        again = _is_recomputing() and thread not in self._threads
        if again:  # the end of the backward pass takes the place of the end of the scope
            Variable._execution_engine.queue_callback(_Forget(self, thread))
        elif not self.is_open and thread not in self._threads:
            return
        version = -1 if x.is_inference() else x._version
        self._threads[thread] = _Kept(x, version, checkpointed_region(), torch.is_grad_enabled())
        if not again:
            self.eager = x

    def take(self) -> Tensor | None:
        """What the later layer's graft reads; None where there is no input of this pass."""
        if torch.compiler.is_compiling():
            found = self.traced if self.traced is not None else self.eager
            self.traced = None
            self.eager = None
            return found
        thread, found = threading.get_ident(), self.traced
        kept = self._threads.get(thread)
        if kept is not None:
            self._threads[thread] = None
            self.missed = _why_not(kept)
            found = None if self.missed else kept.x
        elif found is None:
            self.missed = "the earlier layer did not run before it in the same forward pass"
        self.traced = None
        self.eager = None
        return found

    @property
    def is_empty(self) -> bool:
        """It holds no tensor."""
        kept = any(entry is not None for entry in self._threads.values())
        return not kept and self.traced is None and self.eager is None

    def forget(self, thread: int) -> None:
        """Drops what a thread has kept while it recomputed."""
        self._threads.pop(thread, None)


class _Forget:
    """Runs at the end of a backward pass."""

    def __init__(self, carrier: Carrier, thread: int) -> None:
        self._carrier, self._thread = carrier, thread

    def __call__(self) -> None:
        self._carrier.forget(self._thread)


class Source(nn.Module):
    """In the slot of the earlier layer; hands over its input."""

    def __init__(self, carrier: Carrier) -> None:
        super().__init__()
        self.carrier = carrier


class ScopeHook:
    """A hook of the module around both layers."""

    def __init__(self, carrier: Carrier, *, begins: bool) -> None:
        self.carrier, self.begins = carrier, begins

    def __call__(self, *_: Any) -> None:
        if self.begins:
            self.carrier.begin()
        else:
            self.carrier.end()


@dataclass(frozen=True, slots=True)
class Span:
    """A span that a model's slots ask for: names of its layers, and what is between them."""

    since: str
    layer: str
    slug: str
    carrier: Carrier

    @property
    def source_name(self) -> str:
        """Of its :class:`Source` in the slot of the earlier layer; it contains no dot."""
        return f"{self.slug}_to_{self.layer.replace('.', '-')}"

    def scopes(self, model: nn.Module) -> Iterator[nn.Module]:
        """The smallest module around both layers that can be called, and the model."""
        name = scope_of(model, self.since, self.layer)
        if name:
            yield model.get_submodule(name)
        yield model


def scope_of(model: nn.Module, since: str, layer: str) -> str:
    """Name of the smallest module around both layers that can be called; empty: the model."""
    mine, theirs = since.split("."), layer.split(".")
    shared = 0
    while mine[shared] == theirs[shared]:
        shared += 1
    while shared and isinstance(
        model.get_submodule(".".join(mine[:shared])), nn.ModuleList | nn.ModuleDict
    ):
        shared -= 1
    return ".".join(mine[:shared])


def lay_hooks(model: nn.Module, spans: list[Span]) -> bool:
    """Gives each span the hooks of its scopes, and takes away those that belong to none.

    Returns:
        True where a hook was added: code that was compiled before does not run it.
    """
    wanted = {(scope, id(span.carrier)): span for span in spans for scope in span.scopes(model)}
    present: set[tuple[nn.Module, int]] = set()
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in [*hooks.items()]:
                if not isinstance(hook, ScopeHook):
                    continue
                key = (module, id(hook.carrier))
                if key in wanted:
                    present.add(key)
                else:
                    _remove(module, hooks, number)
    for key, span in wanted.items():
        if key not in present:
            scope = key[0]
            scope.register_forward_pre_hook(ScopeHook(span.carrier, begins=True))
            scope.register_forward_hook(ScopeHook(span.carrier, begins=False), always_call=True)
    return bool(wanted.keys() - present)


def _remove(module: nn.Module, hooks: Any, number: int) -> None:
    del hooks[number]
    module._forward_hooks_always_called.pop(number, None)


def _is_recomputing() -> bool:
    """Inside a backward pass, where only activation checkpointing runs layers."""
    return bool(torch._C._current_graph_task_id() != -1)


def checkpointed_region() -> object:
    """What identifies the part of the pass that activation checkpointing recomputes; None: none.

    It installs a function of its own for each such part, for all tensors that are saved there.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or getattr(hooks[0], "__module__", "") != _CHECKPOINT:
        return None
    return hooks[0]


def _why_not(kept: _Kept) -> str:
    if kept.region is not checkpointed_region() or kept.grad != torch.is_grad_enabled():
        return (
            "activation checkpointing, or no_grad, covers one of its two layers and not the other"
        )
    if not kept.x.is_inference() and kept.x._version != kept.version:
        return "the input of the earlier layer was changed in place before the later layer ran"
    return ""
