"""The ledger: which tensors an optimizer trains, and how tensors are added and removed.

New weights get a group of their own with fresh state, so that Adam's bias correction starts at
step 1. Enlarging a tensor and padding its moments overshot six-fold or starved
in measurements (reference/growth.md, section 6.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from esper.contracts import Finding, Severity, ViolationRule
from esper.exceptions import GraftError
from esper.fail_closed import contained

WARMUP_STEPS = 100
MANY = 8  # at most so many tensors with the same problem are named one by one
LAYER_KEY = "esper_layer"
# Per-group lists of torch's schedulers; they do not grow with the optimizer (pytorch#53712).
GROUP_LISTS = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)
# Keys that the warm-up adds to a group; plain numbers, so that a state dict includes them.
_TAKEN = "esper_steps"
_WARMUP = "esper_warmup_steps"
_DECAY = "esper_weight_decay"
_HELD = "esper_held_lr"


@dataclass(slots=True)
class GroupReceipt:
    """A parameter group that was added; :meth:`remove` removes it exactly."""

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    schedulers: tuple[Any, ...]

    def remove(self) -> None:
        """Removes the group, its state and its place in schedulers; a second call does nothing."""
        # Found by its tensors: the optimizer's load_state_dict replaces the group dicts.
        own = {id(parameter) for parameter in self.group["params"]}
        groups = enumerate(self.optimizer.param_groups)
        places = [i for i, g in groups if own == {id(p) for p in g["params"]}]
        for place in places:
            for scheduler in self.schedulers:
                _shrink_lists(scheduler, place, len(self.optimizer.param_groups))
            del self.optimizer.param_groups[place]
        for parameter in self.group["params"]:
            self.optimizer.state.pop(parameter, None)


def is_users_group(group: dict[str, Any]) -> bool:
    """The script made the group, not a graft or a remedy."""
    return LAYER_KEY not in group


def is_own_key(key: str) -> bool:
    """Esper added this entry to a group."""
    return key.startswith("esper_")


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers such as ``AcceleratedOptimizer``."""
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not a torch optimizer")
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
    training = (o for o in inner if any(id(p) in own for g in o.param_groups for p in g["params"]))
    return next(training, inner[0] if inner else None)


def add_group(
    optimizer: Any,
    parameters: Sequence[nn.Parameter],
    *,
    layer: str,
    host: nn.Module | None = None,
    schedulers: Sequence[Any] = (),
    warmup_steps: int = WARMUP_STEPS,
    weight_decay: float | None = None,
) -> GroupReceipt:
    """Adds new parameters to ``optimizer``, in a group of their own.

    The group has the hyper-parameters of the layer's own group. During ``warmup_steps`` its
    learning rate rises linearly to that group's, also when a scheduler changes it, and its weight
    decay is zero.

    Args:
        layer: name of the layer, kept in the group as ``esper_layer``.
        host: the layer whose group provides the hyper-parameters; None: the first group.
        schedulers: schedulers whose per-group lists must grow.
        weight_decay: after the warm-up; None: the copied group's.

    Raises:
        GraftError: this optimizer accepts no new group. Nothing was changed.
    """
    inner = unwrap_optimizer(optimizer)
    _refuse_rigid(inner, parameters, layer)
    place = _place_of(inner, host)
    template = inner.param_groups[place]
    group = {key: value for key, value in template.items() if key not in ("params", "param_names")}
    group = {key: _own_copy(value) for key, value in group.items()}
    group.update({LAYER_KEY: layer, _TAKEN: 0, _WARMUP: warmup_steps, "params": list(parameters)})
    if "param_names" in template:
        group["param_names"] = [f"{layer}.{i}" for i in range(len(parameters))]
    if "weight_decay" in group:
        group[_DECAY] = group["weight_decay"] if weight_decay is None else weight_decay
    mine = tuple(s for s in unwrap_schedulers(schedulers) if _drives(s, inner))
    size = len(inner.param_groups)
    inner.add_param_group(group)
    for scheduler in mine:
        _grow_lists(scheduler, place, size)
    _start_state(inner, parameters)
    keep_warming(inner)
    return GroupReceipt(inner, inner.param_groups[-1], mine)


def remove_groups_of(
    parameters: Iterable[nn.Parameter], optimizers: Sequence[Any], schedulers: Sequence[Any] = ()
) -> None:
    """Removes every group with one of the parameters, its state and its place in schedulers."""
    gone = {id(parameter) for parameter in parameters}
    for optimizer in map(unwrap_optimizer, optimizers):
        mine = tuple(s for s in unwrap_schedulers(schedulers) if _drives(s, optimizer))
        for group in list(optimizer.param_groups):
            if any(id(parameter) in gone for parameter in group["params"]):
                GroupReceipt(optimizer, group, mine).remove()


def drop_parameters(parameters: Iterable[Tensor], optimizers: Sequence[Any]) -> None:
    """Removes parameters and their state from every optimizer; groups stay, even empty ones."""
    gone = {id(parameter): parameter for parameter in parameters}
    for optimizer in map(unwrap_optimizer, optimizers):
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in gone.values():
            optimizer.state.pop(parameter, None)


def reorder_groups(optimizer: Any, order: Sequence[int], schedulers: Sequence[Any] = ()) -> None:
    """Reorders the groups, and their entries in the schedulers that drive them.

    ``order[i]`` is the present position of the group that gets position ``i``.
    """
    inner = unwrap_optimizer(optimizer)
    size = len(inner.param_groups)
    for scheduler in unwrap_schedulers(schedulers):
        if _drives(scheduler, inner):
            for values in group_lists(scheduler, size).values():
                values[:] = [values[place] for place in order]
    inner.param_groups[:] = [inner.param_groups[place] for place in order]


def audit(model: nn.Module, optimizers: Iterable[Any]) -> list[Finding]:
    """Compares the model's trainable tensors with those of the optimizers.

    Finds trainable tensors in no optimizer, tensors of an optimizer that are not in the model,
    tensors held twice, tensors that were frozen after an optimizer had trained them (frozen from
    the start is the user's choice), and state of tensors in no group.
    """
    holdings = _Holdings.read([unwrap_optimizer(optimizer) for optimizer in optimizers])
    if not holdings.optimizers:
        return []
    return to_findings([*_tensor_problems(model, holdings), *_optimizer_problems(model, holdings)])


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a tensor, or of an optimizer (then ``parameter`` is empty).

    Attributes:
        slug: the rule of ``esper.diagnosis`` that it is evidence of; empty for none.
    """

    parameter: str
    severity: Severity
    observed: str
    remedy: str
    slug: str = ""


def to_findings(problems: Iterable[Problem]) -> list[Finding]:
    """One finding each, or one for all if more than :data:`MANY` tensors have the same problem."""
    alike: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        alike.setdefault((problem.severity, problem.observed, problem.remedy), []).append(problem)
    return [finding for same in alike.values() for finding in _findings_of(same)]


def is_warming(group: dict[str, Any]) -> bool:
    """The group's learning rate is still rising to its full value."""
    return _TAKEN in group and group[_TAKEN] < group[_WARMUP]


@dataclass(slots=True)
class _Holdings:
    optimizers: list[torch.optim.Optimizer]
    held: dict[int, int] = field(default_factory=dict)  # id(parameter) -> in how many places
    trained: set[int] = field(default_factory=set)  # id(parameter) with state from earlier steps
    dead_state: int = 0

    @classmethod
    def read(cls, optimizers: list[torch.optim.Optimizer]) -> _Holdings:
        holdings = cls(optimizers)
        for optimizer in optimizers:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            for parameter in own:
                holdings.held[id(parameter)] = holdings.held.get(id(parameter), 0) + 1
            holdings.trained |= {id(key) for key, state in optimizer.state.items() if state}
            keys = {id(parameter) for parameter in own}
            holdings.dead_state += sum(id(key) not in keys for key in optimizer.state)
        return holdings


def _tensor_problems(model: nn.Module, holdings: _Holdings) -> Iterator[Problem]:
    for name, parameter in model.named_parameters():
        times = holdings.held.get(id(parameter), 0)
        if parameter.requires_grad and not times:
            yield Problem(
                name,
                Severity.SERIOUS,
                "trainable, but in no optimizer: it will never change",
                "give it to the optimizer, or set requires_grad=False",
                slug="not_held",
            )
        if times and not parameter.requires_grad and id(parameter) in holdings.trained:
            yield Problem(
                name,
                Severity.CAUTION,
                "frozen, after an optimizer has trained it",
                "set requires_grad=True, or take it out of the optimizer",
            )
        if times > 1:
            yield Problem(
                name,
                Severity.SERIOUS,
                f"held {times} times: it is updated more than once a step",
                "keep it in one parameter group of one optimizer",
            )


def _optimizer_problems(model: nn.Module, holdings: _Holdings) -> Iterator[Problem]:
    known = {id(parameter) for parameter in model.parameters()}
    foreign = sum(key not in known for key in holdings.held)
    if foreign:
        yield Problem(
            "",
            Severity.CAUTION,
            f"{foreign} tensors held by an optimizer are not in the model",
            "rebuild the optimizer after replacing layers",
        )
    if holdings.dead_state:
        yield Problem(
            "",
            Severity.CAUTION,
            f"{holdings.dead_state} entries of optimizer state belong to no group",
            "remove them from optimizer.state; they only use memory",
        )


def _findings_of(same: Sequence[Problem]) -> list[Finding]:
    if len(same) <= MANY:
        return [_finding(problem) for problem in same]
    whole = f"{len(same)} tensors, the first is {same[0].parameter}: {same[0].observed}"
    return [_finding(replace(same[0], parameter="", observed=whole))]


def _finding(problem: Problem) -> Finding:
    layer, _, tensor = problem.parameter.rpartition(".")
    return Finding(
        rule=ViolationRule.OPTIMIZER_LEDGER,
        layer=layer,
        severity=problem.severity,
        observed=f"{tensor}: {problem.observed}" if tensor else problem.observed,
        limit="the optimizers hold each trainable tensor of the model once, and no other tensor",
        remedy=problem.remedy,
        slug=problem.slug,
    )


def _refuse_rigid(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], layer: str
) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise GraftError("LBFGS trains one flat vector and accepts no new weights", layer=layer)
    if isinstance(optimizer, torch.optim.SparseAdam):
        reason = "SparseAdam accepts only sparse gradients, and new weights have dense ones"
        raise GraftError(f"{reason}; add another optimizer first", layer=layer)
    matrices_only = type(optimizer).__name__ == "Muon"
    if matrices_only and any(parameter.dim() != 2 for parameter in parameters):
        raise GraftError("Muon trains only matrices; add another optimizer first", layer=layer)


def _place_of(optimizer: torch.optim.Optimizer, host: nn.Module | None) -> int:
    own = {id(parameter) for parameter in host.parameters()} if host is not None else set()
    for place, group in enumerate(optimizer.param_groups):
        if LAYER_KEY not in group and any(id(p) in own for p in group["params"]):
            return place
    return 0


def _own_copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _drives(scheduler: Any, optimizer: torch.optim.Optimizer) -> bool:
    held = getattr(scheduler, "optimizer", None)
    return held is None or unwrap_optimizer(held) is optimizer


def _grow_lists(scheduler: Any, place: int, size: int) -> None:
    for values in group_lists(scheduler, size).values():
        values.append(_own_copy(values[place]))


def _shrink_lists(scheduler: Any, place: int, size: int) -> None:
    for values in group_lists(scheduler, size).values():
        del values[place]


def group_lists(scheduler: Any, size: int) -> dict[str, list[Any]]:
    """name -> list of a scheduler's attributes that hold one entry for each of ``size`` groups."""
    lists = {name: vars(scheduler).get(name) for name in GROUP_LISTS}
    return {
        name: values
        for name, values in lists.items()
        if isinstance(values, list) and len(values) == size
    }


def _start_state(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    # Adagrad alone creates its state when it is built, and expects it later (pytorch#53712).
    if not isinstance(optimizer, torch.optim.Adagrad):
        return
    start = optimizer.defaults["initial_accumulator_value"]
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "sum": torch.full_like(parameter, start, memory_format=torch.preserve_format),
        }


def keep_warming(optimizer: Any) -> None:
    """Registers the hooks of the warm-up; a second call does nothing.

    The rate is changed only during a step, because a scheduler writes the group's lr every step.
    State dicts and pickles of an optimizer contain no hooks: call this after loading one.
    """
    inner = unwrap_optimizer(optimizer)
    # Checked separately: a graft may have failed between the two registrations.
    if _before_step not in inner._optimizer_step_pre_hooks.values():
        inner.register_step_pre_hook(_before_step)
    if _after_step not in inner._optimizer_step_post_hooks.values():
        inner.register_step_post_hook(_after_step)


@contained("warm-up", "New weights start at the full learning rate of their group.")
def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if _TAKEN in group:
            _lower_lr(group)


@contained("warm-up", "The warm-up of new weights does not end.")
def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if _TAKEN in group:
            _restore_lr(group)
            group[_TAKEN] += 1


def _lower_lr(group: dict[str, Any]) -> None:
    _restore_lr(group)  # left from a step that raised
    warming = is_warming(group)
    if _DECAY in group:
        group["weight_decay"] = 0.0 if warming else group[_DECAY]
    # Adafactor with relative steps has no rate to lower.
    if warming and group.get("lr") is not None:
        group[_HELD] = group["lr"]
        group["lr"] = group["lr"] * ((group[_TAKEN] + 1) / group[_WARMUP])


def _restore_lr(group: dict[str, Any]) -> None:
    if _HELD in group:
        group["lr"] = group.pop(_HELD)
