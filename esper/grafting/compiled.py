"""Which parts of a model run as code of torch.compile, and where eager code calls them.

A hook inside such a part either splits the graph or does not run. So Esper installs none there;
what it must see, it sees in a copy that runs eagerly (:mod:`esper.grafting.layers.eager_pass`) on
the arguments of a forward pass, which are read where eager code hands them over:

    torch.compile(model)    a pre-forward hook of the wrapper, which is an eager module itself
    model.compile()         around the compiled call, because hooks of the model are inside of it
    blocks compiled alone   a pre-forward hook of the model
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import config, convert_frame
from torch._dynamo.eval_frame import OptimizedModule

from esper.grafting.hooks import PassingHook

_VARIANTS_OF_GRAFT = 2  # with gradients and without
Reader = Callable[[tuple[Any, ...], Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a model that torch.compile has compiled as one.

    Attributes:
        name: of the part, empty for the whole model.
        module: the part.
        entry: what eager code calls: torch.compile's wrapper, or the part after ``compile()``.
    """

    name: str
    module: nn.Module
    entry: nn.Module

    def inside(self, layer: str) -> str:
        """The layer's name inside of the part."""
        return layer.removeprefix(f"{self.name}." if self.name else "").removeprefix("_orig_mod.")

    def before_call(self, read: Reader) -> Callable[[], None]:
        """Calls ``read(args, kwargs)`` before each call; returns a function that ends this."""
        return _before_call(self.entry, read)


class Compilation:
    """What torch.compile has made of one model so far.

    Args:
        model: the module that holds the layers.
        trained: what the training loop calls: the model, or wrappers around it.
    """

    def __init__(self, model: nn.Module, trained: Any = None) -> None:
        self._model = model
        self._wrapper = next(_compiled_wrappers(trained, model), None)

    @property
    def regions(self) -> tuple[str, ...]:
        """Names of the outermost modules that run compiled; ``("",)`` is the whole model."""
        if self._wrapper is not None:
            return ("",)
        found: list[str] = []
        for name, module in self._model.named_modules():
            if is_compiled(module) and not _is_inside(name, found):
                found.append(name)
        return tuple(found)

    def covers(self, layer: str) -> bool:
        """The layer runs in compiled code."""
        module: nn.Module | None = self._model
        if self._wrapper is not None or is_compiled(self._model):
            return True
        for part in layer.split("."):
            module = module._modules.get(part) if module is not None else None
            if module is not None and is_compiled(module):
                return True
        return False

    def region_of(self, layer: str) -> Region | None:
        """The outermost compiled part that contains the layer; None: the layer runs eagerly."""
        if self._wrapper is not None:
            return Region("", self._model, self._wrapper)
        entry: nn.Module | None = self._model
        parts = layer.split(".")
        for depth in range(len(parts) + 1):
            if entry is None:
                return None
            if is_compiled(entry):
                module = entry._orig_mod if isinstance(entry, OptimizedModule) else entry
                return Region(".".join(parts[:depth]), module, entry)
            entry = entry._modules.get(parts[depth]) if depth < len(parts) else None
        return None

    def search(self) -> bool:
        """Looks for a wrapper that was made since; True if one is known.

        torch keeps no list of them, so this visits all objects of the process: call it once.
        """
        if self._wrapper is None:
            made = (o for o in gc.get_objects() if type(o) is OptimizedModule)
            self._wrapper = next((o for o in made if _leads_to(o, self._model)), None)
        return self._wrapper is not None

    def before_forward(self, read: Reader) -> Callable[[], None]:
        """Calls ``read(args, kwargs)`` before each forward pass that eager code begins.

        Returns:
            A function that ends this.
        """
        return _before_call(self._model if self._wrapper is None else self._wrapper, read)


def anything_was_compiled() -> bool:
    """torch.compile has compiled some code of this process."""
    return bool(convert_frame.FRAME_COMPILE_COUNTER)


def forget_compiled_code() -> None:
    """Lets torch compile everything again at its next run.

    Compiled code does not check for hooks again: code compiled before a slot was added would never
    run a graft. Where nothing was compiled, torch is left alone: its reset would import Inductor on
    a machine with a GPU, which takes seconds, in the training thread.
    """
    if anything_was_compiled():
        torch.compiler.reset()


def make_room_for_graft() -> None:
    """Lets torch.compile keep the code of one more graft beside the code without it.

    A module keeps at most ``recompile_limit`` variants of its code, 8 by default. Above it torch
    runs the module eagerly, or ends the forward pass where ``fullgraph=True`` was asked for.
    """
    if anything_was_compiled():
        config.recompile_limit += _VARIANTS_OF_GRAFT


def is_compiled(module: nn.Module) -> bool:
    """``torch.compile(module)``, or a module after ``module.compile()``."""
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def _before_call(entry: nn.Module, read: Reader) -> Callable[[], None]:
    if entry._compiled_call_impl is not None:
        return _around_call(entry, read)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read(args, kwargs)

    return entry.register_forward_pre_hook(PassingHook(hook, takes=3), with_kwargs=True).remove


def _around_call(entry: nn.Module, read: Reader) -> Callable[[], None]:
    compiled = entry._compiled_call_impl
    assert compiled is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        read(args, kwargs)
        return compiled(*args, **kwargs)

    call.compiled_call = compiled  # type: ignore[attr-defined]
    entry._compiled_call_impl = call

    def end() -> None:
        # Somebody else may have compiled the module again since.
        if entry._compiled_call_impl is call:
            entry._compiled_call_impl = compiled

    return end


def _compiled_wrappers(trained: Any, model: nn.Module) -> Iterator[Any]:
    """The compiled ones among the wrappers of a model, outermost first."""
    while isinstance(trained, nn.Module) and trained is not model:
        if is_compiled(trained):
            yield trained
        trained = _inner(trained)


def _inner(wrapper: nn.Module) -> Any:
    parts = vars(wrapper).get("_modules", {})  # none: another thread just builds it
    compiled = parts.get("_orig_mod")
    return compiled if compiled is not None else parts.get("module")


def without_compiler(model: Any) -> Any:
    """The module that torch.compile wraps; everything else as it is.

    Not by ``getattr``, because some models answer every attribute.
    """
    return model._modules["_orig_mod"] if isinstance(model, OptimizedModule) else model


def _leads_to(wrapper: nn.Module, model: nn.Module) -> bool:
    inner: Any = wrapper
    while isinstance(inner, nn.Module) and inner is not model:
        inner = _inner(inner)
    return inner is model


def _is_inside(name: str, regions: Any) -> bool:
    return any(not region or f"{name}.".startswith(f"{region}.") for region in regions)
