"""A forward pass of a copy, beside the training: how layers inside compiled code are seen.

The copy shares the parameters and owns everything else, so that the original stays as it is, to
the bit: random streams are put back, buffers and Python attributes are the copy's. Refused before
they happen are writes to a tensor that the pass did not make, collective operations, and hooks of
the program. Python objects outside of the copy that changed are put back, and refused from then on.

Shape legend: B rows of the batch.
"""

from __future__ import annotations

import copy
import dis
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from esper.fail_closed import is_the_scripts
from esper.grafting.hooks import PassingHook
from esper.grafting.slot import run_slot, slots
from esper.grafting.tensors.random_streams import kept_streams

FEWEST_ROWS = 2  # BatchNorm refuses to train on one
SHARE_OF_BATCH = 8  # one in so many rows is enough for statistics
_CONTAINERS = (list, dict, set, deque)
_TRUSTED = {"torch", "esper", *sys.stdlib_module_names} - {"__main__"}


class SideEffectError(Exception):
    """The model's forward pass may change something outside of a copy."""


def run_copy(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    look: Callable[[nn.Module], None],
    *,
    whole_batch: bool = False,
    gradients: bool = False,
) -> None:
    """Runs a copy of ``model`` eagerly, in the caller's autocast.

    Args:
        args, kwargs: of a forward pass of the model; they are not written to.
        look: called with the copy before it runs, to register hooks on it.
        whole_batch: all rows, for their shapes; otherwise some of the first.
        gradients: autograd keeps its graph, so that it can be read; nothing runs backward.

    Raises:
        SideEffectError: the pass cannot be kept apart from the original; nothing was changed.
        Exception: whatever the model's code raises.
    """
    reason = why_not_copied(model)
    if reason:
        raise SideEffectError(reason)
    given = (args, dict(kwargs))
    try:
        _run(model, given if whole_batch else _some_rows(given), look, gradients)
    except SideEffectError:
        raise
    except Exception as error:
        # The first axis is not the batch, or some other size depends on it.
        if whole_batch or is_the_scripts(error):
            raise
        _run(model, given, look, gradients)


def _run(model: nn.Module, given: Any, look: Callable[[nn.Module], None], gradients: bool) -> None:
    copied = _copy_of(model)
    look(copied)
    with (
        kept_streams(),
        torch.set_grad_enabled(gradients),
        _without_autocast_cache(),
        _kept_objects(model),
        torch.compiler.set_stance("force_eager"),
        _OwnTensorsOnly(copied.buffers()),
    ):
        args, kwargs = tree_map(_own, given)
        copied(*args, **kwargs)


def why_not_copied(model: nn.Module) -> str:
    """Why a pass of a copy may have side effects; empty if nothing is known."""
    if torch.is_inference_mode_enabled() or torch._C._functorch.maybe_current_level() is not None:
        return "the forward pass runs in inference mode or inside a torch.func transform"
    if parametrize._cache_enabled:
        return "the forward pass runs inside torch.nn.utils.parametrize.cached()"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "hooks are registered for all modules of the process, and would run once more"
    for name, module in model.named_modules():
        reason = _why_not(module)
        if reason:
            return f"{name or 'the model'}: {reason}"
    return ""


def _why_not(module: nn.Module) -> str:
    hooks = itertools.chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    if not all(map(_is_known, hooks)):
        return "a hook of the program is registered on it, and would run once more"
    for held in vars(module).values():
        if isinstance(held, FunctionType) and any(
            isinstance(value, nn.Module) for value in _remembered(held)
        ):
            return "it holds a function that remembers a module, which would run itself"
    return ""


def _is_known(hook: Any) -> bool:
    """Hooks of Esper, and those of torch that compute a layer's weight."""
    if hook is run_slot or isinstance(hook, PassingHook):
        return True
    origin = hook if isinstance(hook, FunctionType) else type(hook)
    return str(origin.__module__).startswith("torch.nn.utils.")


def _copy_of(model: nn.Module) -> nn.Module:
    """A deep copy with the same Parameter objects."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):
                # Such as an output that was kept: torch copies no tensor with a history.
                memo.setdefault(id(value), value.detach())
    copied = copy.deepcopy(model, memo)
    for _, _, slot in slots(copied):
        slot.attaches = False  # the hooks would sit on the parameters that are shared
    for _, _, slot in slots(model):
        _ = slot.copies  # forgets the slots of earlier copies
    return copied


@contextmanager
def _kept_objects(model: nn.Module) -> Iterator[None]:
    """Puts back what the block has changed outside of the copy, in Python.

    Known are the attributes of the program's classes, and what the code of its forward passes
    can name: variables of its Python modules, and what its functions remember.

    Raises:
        SideEffectError: something had changed.
    """
    kinds: set[Any] = {type(module) for module in model.modules()}
    kept = [_Kept(name, held) for kind in kinds for name, held in _within_reach(kind)]
    try:
        yield
    finally:
        changed = [each.name for each in kept if each.put_back()]
    if changed:
        raise SideEffectError(f"the forward pass changes {', '.join(sorted(set(changed)))}")


class _Kept:
    """The members of a container, a class, an object or a namespace at one moment."""

    def __init__(self, name: str, held: Any) -> None:
        self.name = name
        self._held = held
        self._before = _members(held)

    def put_back(self) -> bool:
        """True if there was something to put back."""
        now = _members(self._held)
        if len(now) == len(self._before) and all(
            mine is theirs for mine, theirs in zip(now, self._before, strict=True)
        ):
            return False
        _refill(self._held, self._before)
        return True


class _Variable:
    """One variable of a Python module."""

    def __init__(self, namespace: dict[str, Any], name: str) -> None:
        self.namespace = namespace
        self.name = name


def _members(held: Any) -> list[Any]:
    if isinstance(held, _Variable):
        return [held.namespace.get(held.name)]
    if isinstance(held, dict):
        return [part for pair in held.items() for part in pair]
    if isinstance(held, _CONTAINERS):
        return list(held)
    # Python itself adds names to classes: __abstractmethods__ and the like.
    shown = [(name, value) for name, value in vars(held).items() if not name.startswith("__")]
    return [part for pair in shown for part in pair]


def _refill(held: Any, before: list[Any]) -> None:
    if isinstance(held, _Variable):
        held.namespace[held.name] = before[0]
    elif isinstance(held, dict):
        held.clear()
        held.update(zip(before[::2], before[1::2], strict=True))
    elif isinstance(held, _CONTAINERS):
        held.clear()
        getattr(held, "update" if isinstance(held, set) else "extend")(before)
    else:
        for name in [name for name in vars(held) if not name.startswith("__")]:
            delattr(held, name)
        for name, value in zip(before[::2], before[1::2], strict=True):
            setattr(held, name, value)


def _within_reach(kind: Any) -> Iterator[tuple[str, Any]]:
    """(name, object) of all that a forward pass of this class may change, beside its instance."""
    for base in kind.__mro__:
        if _is_of_program(base.__module__):
            yield f"the class {base.__name__}", base
    for function in _functions_of(kind):
        for name in _names_in(function.__code__):
            if name in function.__globals__:
                yield name, _Variable(function.__globals__, name)
                yield from _holder(name, function.__globals__[name])
        for value in _remembered(function):
            yield from _holder(f"what {function.__name__} remembers", value)


def _holder(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, _CONTAINERS):
        yield name, value
    elif isinstance(value, type):
        if _is_of_program(value.__module__):
            yield name, value
    elif _is_of_program(type(value).__module__) and hasattr(value, "__dict__"):
        yield name, value


def _is_of_program(module: str) -> bool:
    """Code of the program or of a library that defines models; neither torch's nor Python's."""
    return module.partition(".")[0] not in _TRUSTED


@cache
def _functions_of(kind: Any) -> tuple[FunctionType, ...]:
    """The functions of the program that a forward pass of this class may call."""
    found: dict[FunctionType, None] = {}
    todo: list[Any] = [kind.forward]
    while todo:
        function = todo.pop()
        if function in found or not _is_of_program(function.__module__ or ""):
            continue
        found[function] = None
        named = (function.__globals__.get(name) for name in _names_in(function.__code__))
        methods = (getattr(kind, name, None) for name in _attributes_in(function.__code__))
        for value in (*named, *methods, *_remembered(function)):
            value = value.fget if isinstance(value, property) else value
            if isinstance(value, FunctionType):
                todo.append(value)
    return tuple(found)


def _names_in(code: CodeType) -> Iterator[str]:
    """Names of the Python module that the code reads or writes."""
    return _operands(code, {"LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL"})


def _attributes_in(code: CodeType) -> Iterator[str]:
    return _operands(code, {"LOAD_ATTR", "LOAD_METHOD"})


def _operands(code: CodeType, operations: set[str]) -> Iterator[str]:
    for part in dis.get_instructions(code):
        if part.opname in operations:
            yield str(part.argval)
        elif isinstance(part.argval, CodeType):  # a function inside the function
            yield from _operands(part.argval, operations)


def _remembered(function: FunctionType) -> list[Any]:
    """The variables of outer functions that a function uses."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return found


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast would keep the weights that it narrows here, without their gradients."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _some_rows(given: Any) -> Any:
    """The first rows of each tensor that has as many rows as the first tensor."""
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    batch = next((len(tensor) for tensor in tensors if _has_rows(tensor)), 0)
    rows = max(FEWEST_ROWS, -(-batch // SHARE_OF_BATCH))

    def cut(value: Any) -> Any:
        rowed = isinstance(value, Tensor) and _has_rows(value) and len(value) == batch
        return value[:rows] if rowed else value

    return tree_map(cut, given)


def _has_rows(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and tensor.dim() > 0


class _OwnTensorsOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations that reach outside of the block, before they run.

    An operation may write to tensors that were made inside, and to ``owned``.
    """

    def __init__(self, owned: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owned = {_storage(tensor) for tensor in owned}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace in {"c10d", "_c10d_functional"}:
            raise SideEffectError("the forward pass communicates with other ranks")
        if kwargs.get("generator") is not None:
            raise SideEffectError("the forward pass draws from a generator of its own")
        for value in _written(func, args, kwargs):
            if _storage(value) not in self._owned:
                raise SideEffectError(f"{func} writes to a tensor that the forward pass keeps")
        result = func(*args, **kwargs)
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = {_storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        self._owned |= made - given
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to."""
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        # The schema of a BatchNorm does not say that it updates its running statistics.
        updated = argument.name in {"running_mean", "running_var"}
        if updated or (argument.alias_info is not None and argument.alias_info.is_write):
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(tensor)
