"""The ledger: which tensors the optimizers and their companions train, and which none does."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from esper.contracts import Finding, Severity, ViolationRule
from esper.grafting.companions.companion import companions_of, with_companions
from esper.grafting.optimizers import parameters_of, unwrap_optimizer
from esper.grafting.tensors.versions import writes_to
from esper.grafting.trained_tensors.orphans import Orphans, Unheld
from esper.sharding import named_holders

MANY = 8  # at most so many tensors with the same problem are named one by one
# Frozen by a remedy: their optimizers go on holding them, which is no problem of the run.
_frozen_on_purpose = WeakIdKeyDictionary()


def freeze(parameters: Iterable[Tensor]) -> None:
    """Freezes tensors. Their optimizers skip them, and keep their state for when they train again.

    Taking them out of the groups would make state dicts and per-group lists of schedulers misfit.
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
        _frozen_on_purpose[parameter] = True


class FrozenInTurns:
    """Tells what is frozen for good from what a script freezes in turns, as the parts of a GAN.

    Args:
        steps: how long a tensor must be frozen, and not written to, until it is for good.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        # Tensor -> (update, writes) when it was seen first.
        self._seen: Any = WeakIdKeyDictionary()

    def for_good(self, parameter: Tensor, update: int) -> bool:
        """Asked now and then for a tensor that is frozen, after so many updates of the run."""
        now = writes_to(parameter)
        since, writes = self._seen.get(parameter, (update, -1))
        if writes != now:  # seen for the first time, or trained meanwhile, or loaded
            self._seen[parameter] = update, now
            return False
        return bool(update - since >= self._steps)


def audit(
    model: nn.Module,
    optimizers: Iterable[Any],
    unheld: Unheld | None = None,
    is_frozen: Callable[[Tensor], bool] = lambda _: True,
) -> list[Finding]:
    """Compares the model's trainable tensors with those of the optimizers and their companions.

    Args:
        unheld: what a watch has seen of the tensors in no optimizer; None: nobody watches them.
        is_frozen: asked for a tensor that does not train now; False: the script thaws it again.

    Finds trainable tensors in no optimizer, tensors of an optimizer that are not in the model,
    tensors held twice, tensors that were frozen after an optimizer had trained them (frozen from
    the start is the user's choice), state of tensors in no group, and grafts whose companion is of
    another class or has failed.
    """
    users = [unwrap_optimizer(optimizer) for optimizer in optimizers]
    holdings = _Holdings.read(with_companions(users))
    if not holdings.optimizers:
        return []
    own = dict(named_holders(model))
    orphans = Orphans.of(own, holdings.optimizers, unheld)
    problems = [
        *_not_held(orphans),
        *_tensor_problems(own, holdings, is_frozen, put_aside=_of_inactive_adapters(model)),
        *_optimizer_problems(orphans, holdings),
    ]
    return to_findings([*problems, *_companion_problems(users)])


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
            own = parameters_of(optimizer)
            for parameter in own:
                holdings.held[id(parameter)] = holdings.held.get(id(parameter), 0) + 1
            holdings.trained |= {id(key) for key, state in optimizer.state.items() if state}
            keys = {id(parameter) for parameter in own}
            # Other keys are the optimizer's own, such as numbers of the whole run.
            stored: list[Any] = list(optimizer.state)
            tensors = [key for key in stored if isinstance(key, Tensor)]
            holdings.dead_state += sum(id(key) not in keys for key in tensors)
        return holdings


def _not_held(orphans: Orphans) -> Iterator[Problem]:
    for name in orphans.untrained:
        yield Problem(
            name,
            Severity.SERIOUS,
            "trainable, but in no optimizer: it will never change",
            "give it to the optimizer, or set requires_grad=False",
            slug="not_held",
        )
    for kind, names in orphans.held_elsewhere.items():
        yield Problem(
            "",
            Severity.INFO,
            f"{len(names)} tensors, the first is {names[0]}, are in {kind}, an optimizer that "
            "Esper was not given: it does not know how they train",
            "attach all optimizers of the model: esper.attach(model, [first, second])",
        )
    if names := orphans.moved:
        yield Problem(
            "",
            Severity.INFO,
            f"{len(names)} tensors, the first is {names[0]}, change, but are in no optimizer that "
            "Esper was given: it does not know how they train",
            "nothing, where the optimizer has its own copies of them; otherwise attach what "
            "trains them",
        )


def _of_inactive_adapters(model: nn.Module) -> set[int]:
    """Ids of the tensors that PEFT's ``set_adapter`` has frozen; a later call thaws them."""
    found: set[int] = set()
    module: Any
    for module in model.modules():
        for name, entry in _adapters_of(module):
            if name not in module.active_adapters:
                alone = isinstance(entry, nn.Parameter)
                found |= {id(p) for p in ([entry] if alone else entry.parameters())}
    return found


def _adapters_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, a part of it) of each adapter that PEFT keeps in the module."""
    for kind in getattr(module, "adapter_layer_names", None) or ():  # some answer None to all
        adapters = getattr(module, kind, None)
        if isinstance(adapters, nn.ModuleDict | nn.ParameterDict):
            yield from adapters.items()


def _tensor_problems(
    own: dict[str, nn.Parameter],
    holdings: _Holdings,
    is_frozen: Callable[[Tensor], bool],
    *,
    put_aside: Container[int],
) -> Iterator[Problem]:
    for name, parameter in own.items():
        times = holdings.held.get(id(parameter), 0)
        trained = times and id(parameter) in holdings.trained
        meant = parameter in _frozen_on_purpose or id(parameter) in put_aside
        if trained and not (parameter.requires_grad or meant) and is_frozen(parameter):
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


def _optimizer_problems(orphans: Orphans, holdings: _Holdings) -> Iterator[Problem]:
    if orphans.foreign and not (orphans.undecided or orphans.moved or orphans.held_elsewhere):
        yield Problem(
            "",
            Severity.CAUTION,
            f"{len(orphans.foreign)} tensors held by an optimizer are not in the model",
            "rebuild the optimizer if a layer was replaced; tensors of a loss or of another model "
            "are no problem, and are not watched",
        )
    if holdings.dead_state:
        yield Problem(
            "",
            Severity.CAUTION,
            f"{holdings.dead_state} entries of optimizer state belong to no group",
            "remove them from optimizer.state; they only use memory",
        )


def _companion_problems(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[Problem]:
    for companion in (c for optimizer in optimizers for c in companions_of(optimizer)):
        if companion.note:
            yield Problem(
                f"{companion.layer}.",
                Severity.INFO,
                companion.note,
                "to choose class and rate yourself, attach another optimizer too",
            )
        if companion.unrepeated:
            yield Problem(
                f"{companion.layer}.",
                Severity.INFO,  # a backward pass that misses the graft looks the same
                "the script changes the gradients of its optimizer's tensors before the step, in a "
                "way that is not repeated on the graft's",
                "change the gradients of model.parameters(), which includes the graft's",
            )
        if companion.error:
            yield Problem(
                f"{companion.layer}.",
                Severity.SERIOUS,
                f"the graft learns no more: {type(companion.optimizer).__name__}, its optimizer, "
                f"failed: {companion.error}",
                "take the graft out",
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
