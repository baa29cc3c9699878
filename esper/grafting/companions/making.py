"""Makes the optimizer of a graft: of the class of one of the user's optimizers, or a plain AdamW.

Whether the class can train the graft's tensors is tried, on a few elements of the same form: Muon
accepts only matrices, SparseAdam only sparse gradients, LBFGS needs a closure, and some classes of
libraries need arguments that they do not keep.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.fail_closed import is_the_scripts
from esper.sharding import local

PLAIN_RATE = 1e-3  # AdamW's usual one; the most that a plain AdamW takes from another class
# Followed even where the constructor does not name them, for example behind **kwargs.
_ALWAYS_FOLLOWED = frozenset({"lr", "betas", "momentum", "weight_decay", "eps"})
MODES = ("train", "eval")  # calls of schedule-free optimizers
_TRIAL_SIZE = 4  # elements of each axis


@dataclass(frozen=True, slots=True)
class Made:
    """An optimizer for new weights.

    Attributes:
        followed: hyper-parameters that it takes from the host's group in each step. Not among them
            are counters and estimates that an optimizer keeps in its group, such as Prodigy's ``d``
            or the ``k`` of schedule-free ones: new weights start with fresh ones.
        rate: multiplies the host group's learning rate.
        note: why it is not of the class of the layer's optimizer; empty if it is.
    """

    optimizer: torch.optim.Optimizer
    followed: frozenset[str]
    rate: float = 1.0
    note: str = ""


def make_like(
    host: torch.optim.Optimizer, group: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> Made:
    """An optimizer for ``parameters`` that works as ``host`` does on the tensors of ``group``.

    Raises:
        Exception: whatever :func:`why_not` says in words.
    """
    arguments = _arguments_of(type(host))
    given = {key: own_copy(host.defaults[key]) for key in arguments if key in host.defaults}
    make: Any = type(host)
    optimizer: torch.optim.Optimizer = make(list(parameters), **given)
    followed = (arguments | _ALWAYS_FOLLOWED) & group.keys() & optimizer.param_groups[0].keys()
    _never_differentiable(optimizer)
    made = Made(optimizer, frozenset(followed - {"differentiable"}))
    follow(made, group)
    return made


def make_plain(group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> Made:
    """AdamW, at a rate that is proportional to the group's from now on.

    A learning rate means something else in another class: Muon's is often 0.02 and LBFGS's 1, at
    which AdamW diverges. So the present one counts for at most :data:`PLAIN_RATE`.
    """
    present = _number(group.get("lr"))
    start = min(present, PLAIN_RATE) if present > 0 else PLAIN_RATE
    decay = _number(group.get("weight_decay"))
    optimizer = torch.optim.AdamW(list(parameters), lr=start, weight_decay=decay)
    if present <= 0:  # there is none to follow, or it is zero at present
        return Made(optimizer, frozenset({"weight_decay"} & group.keys()))
    return Made(optimizer, frozenset({"lr", "weight_decay"} & group.keys()), start / present)


def why_not(
    host: torch.optim.Optimizer, group: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> str:
    """Why an optimizer like ``host`` cannot train ``parameters``; empty if it can."""
    try:
        _try_out(host, group, parameters)
    except Exception as error:
        if is_the_scripts(error):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{type(host).__name__} cannot train these weights ({first[:100]})"
    return ""


def own_copy(value: Any) -> Any:
    """Of a hyper-parameter: a learning rate may be a tensor that a scheduler fills in place."""
    return value.clone() if isinstance(value, Tensor) else value


def follow(made: Made, group: dict[str, Any]) -> None:
    """Takes the hyper-parameters of ``group`` as they are now."""
    own = made.optimizer.param_groups[0]
    for key in made.followed & group.keys():
        own[key] = own_copy(group[key])
    if own.get("lr") is not None and made.rate != 1.0:
        own["lr"] = own["lr"] * made.rate


def grows_with_gradient(made: Made, parameters: Sequence[nn.Parameter]) -> bool:
    """A step is twice as large at twice the gradient, as SGD's is and Adam's is not.

    Tried on the CPU, because a number of a GPU comes behind all that is queued there. Some
    optimizers work on a GPU only.
    """
    try:
        return _grows(made, parameters[0], torch.device("cpu"))
    except Exception as error:
        if is_the_scripts(error):
            raise
        return _grows(made, parameters[0], parameters[0].device)


def _grows(made: Made, parameter: nn.Parameter, device: torch.device) -> bool:
    group = {**made.optimizer.param_groups[0], "lr": PLAIN_RATE}
    moved = []
    for size in (1.0, 2.0):
        tried = _few_elements_of([parameter], gradient=size, device=device)
        _step_on(make_like(made.optimizer, group, tried))
        moved.append(float(tried[0].detach().abs().max()))
    return moved[1] > 1.5 * moved[0]


def _try_out(
    host: torch.optim.Optimizer, group: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> None:
    """Raises what a step of such an optimizer on such tensors raises."""
    forms = {(p.dim(), p.dtype, p.device): p for p in parameters}
    _step_on(make_like(host, group, _few_elements_of(list(forms.values()), gradient=1.0)))


def _few_elements_of(
    parameters: Sequence[nn.Parameter], *, gradient: float, device: torch.device | None = None
) -> list[nn.Parameter]:
    """Zeros of the same form, with a gradient."""
    tried = []
    for parameter in parameters:
        few = [min(size, _TRIAL_SIZE) for size in parameter.shape]
        tried.append(nn.Parameter(local(parameter).new_zeros(few, device=device)))
        tried[-1].grad = local(parameter).new_full(few, gradient, device=device)
    return tried


def _step_on(made: Made) -> None:
    set_mode(made.optimizer, "train")
    made.optimizer.step()


def has_modes(optimizer: Any) -> bool:
    """It is to be told when training and evaluation begin, as schedule-free ones are."""
    return all(callable(getattr(optimizer, mode, None)) for mode in MODES)


def set_mode(optimizer: Any, mode: str) -> None:
    """Calls ``train()`` or ``eval()`` of an optimizer that has such modes."""
    change = getattr(optimizer, mode, None)
    if callable(change):
        change()


def _arguments_of(kind: type) -> frozenset[str]:
    """Names of the constructor's arguments, without the parameters."""
    named = list(inspect.signature(kind).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {argument.name for argument in named if argument.kind not in variable}
    takes_more = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in named)
    return frozenset(names | _ALWAYS_FOLLOWED if takes_more else names)


def _never_differentiable(optimizer: torch.optim.Optimizer) -> None:
    """A graft's weights are leaves, on which a differentiable step would raise."""
    for settings in (optimizer.defaults, *optimizer.param_groups):
        if settings.get("differentiable"):
            settings["differentiable"] = False


def _number(value: Any) -> float:
    return 0.0 if value is None else float(value)
