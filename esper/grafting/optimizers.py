"""What a script passes as its optimizer and schedulers, without the wrappers of frameworks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

# Attributes under which a wrapper keeps the optimizer that it steps: Accelerate and Lookahead, SAM.
_INNER = ("optimizer", "base_optimizer")
# And those of wrappers that are no torch optimizers themselves, such as fastai's.
_INNER_OF_OTHERS = (*_INNER, "base", "opt", "optim", "_optimizer", "_opt", "_optim")


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that makes the steps, inside wrappers such as ``AcceleratedOptimizer``.

    Raises:
        TypeError: there is none.
    """
    if isinstance(optimizer, torch.optim.Optimizer) and is_torchs_own(optimizer):
        return optimizer  # that of most runs, which ask for it many times
    inner = optimizer
    while (wrapped := _wrapped_by(inner)) is not None:
        inner = wrapped
    if isinstance(inner, torch.optim.Optimizer) and not _is_made(inner):
        _make(inner)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} is not a torch optimizer, nor a wrapper that shows one: "
            "pass the torch.optim.Optimizer that makes the steps. A framework with optimizers of "
            "its own often wraps torch's too, as fastai does (opt_func=partial(OptimWrapper, "
            "opt=torch.optim.AdamW))"
        )
    return inner


def unwrap_schedulers(schedulers: Iterable[Any]) -> list[Any]:
    """All schedulers, those inside wrappers and chains too, outermost first."""
    found: list[Any] = []
    waiting = list(schedulers)
    while waiting:
        scheduler = waiting.pop(0)
        inner = getattr(scheduler, "scheduler", None)
        if inner is not None:
            waiting.insert(0, inner)
            continue
        found.append(scheduler)
        waiting[:0] = getattr(scheduler, "_schedulers", [])
    return found


def optimizer_of(optimizers: Sequence[Any], host: nn.Module) -> torch.optim.Optimizer | None:
    """The optimizer that trains the layer; for a frozen layer, the first."""
    inner = [unwrap_optimizer(optimizer) for optimizer in optimizers]
    own = {id(parameter) for parameter in host.parameters()}
    training = (o for o in inner if any(id(p) in own for p in parameters_of(o)))
    return next(training, inner[0] if inner else None)


def is_torchs_own(optimizer: torch.optim.Optimizer) -> bool:
    """Of a class of torch itself, which makes its steps and wraps no other optimizer."""
    return type(optimizer).__module__.startswith("torch.optim.")


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_made(optimizer: torch.optim.Optimizer) -> bool:
    """Its class has called torch's ``__init__``; those of many wrappers, as Lookahead, do not."""
    return hasattr(optimizer, "_optimizer_step_post_hooks")


def _make(optimizer: torch.optim.Optimizer) -> None:
    """Gives it what torch's ``__init__`` does, so that hooks can be registered and are called.

    Torch's own way is to wrap the class's ``step``, after which that of each other optimizer that
    is not made would raise.
    """
    own: dict[str, Any] = vars(optimizer)
    own["_patch_step_function"] = lambda: None
    own.setdefault("defaults", {})
    torch.optim.Optimizer.__setstate__(optimizer, {})  # as torch does when it unpickles one
    del own["_patch_step_function"]
    step: Any = type(optimizer).step
    if not hasattr(step, "hooked"):
        own["step"] = MethodType(torch.optim.Optimizer.profile_hook_step(step), optimizer)


def _wrapped_by(optimizer: Any) -> torch.optim.Optimizer | None:
    is_own = isinstance(optimizer, torch.optim.Optimizer) and _is_made(optimizer)
    names = _INNER if is_own else _INNER_OF_OTHERS
    found = (getattr(optimizer, name, None) for name in names)
    named = next((inner for inner in found if isinstance(inner, torch.optim.Optimizer)), None)
    return named or _only_one_in(optimizer, is_own)


def _only_one_in(optimizer: Any, is_own: bool) -> torch.optim.Optimizer | None:
    """The one that it holds under any name, if that trains all of its own parameters."""
    held = getattr(optimizer, "__dict__", {}).values()
    inner = [value for value in held if isinstance(value, torch.optim.Optimizer)]
    if len(inner) != 1 or not hasattr(inner[0], "param_groups"):
        return None
    if is_own and {*map(id, parameters_of(inner[0]))} != {*map(id, parameters_of(optimizer))}:
        return None
    return inner[0]
