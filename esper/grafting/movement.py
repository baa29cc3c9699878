"""Finds tensors that should learn and do not; checks them a few times, not in each step.

A few elements of each trainable tensor are copied, and compared after some steps of its optimizer.
An unchanged tensor is a finding only with evidence: these elements have a gradient that the steps
did not apply, or there is no gradient at all. It is no finding if the learning rate is zero, new
weights still warm up, the gradient is zero or not finite, or rounding removes the step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper.contracts import Finding, Severity
from esper.fail_closed import contained
from esper.grafting.companion import companions_of, is_warming, with_companions
from esper.grafting.companion_scaling import notice_scaler
from esper.grafting.ledger import Problem, to_findings
from esper.grafting.optimizers import parameters_of, unwrap_optimizer
from esper.grafting.orphans import Unheld
from esper.grafting.slot import SLOT_NAME
from esper.health.transfers import HostTransfer, is_late
from esper.health.updates import Part
from esper.sharding import local, named_holders

NOTICED_STEPS = 3  # of an optimizer, in which a scaler that was not named is looked for
STEPS = 20  # of its optimizer before a tensor is checked
SILENT_STEPS = 200  # of the session without a step of the optimizer; accumulation is rarely longer
SMALLEST_GRADIENT = 1e-7  # a smaller one may be the rounding error of a zero gradient
_SAMPLED = {0: 1, 1: 64, 2: 8, 3: 4}  # axes -> elements of each axis


@dataclass(slots=True)
class _Watched:
    name: str
    parameter: nn.Parameter
    sample: Tensor
    optimizer: int  # place
    since: int  # steps of its optimizer at that time


class MovementWatch:
    """Watches the trainable tensors of one model; call :meth:`step` once per training step.

    Attributes:
        unheld: what was seen of the tensors that none of the optimizers holds.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        self._model = model
        self._optimizers = [unwrap_optimizer(optimizer) for optimizer in optimizers]
        hook = contained("step counter", "Esper does not notice tensors that never move.")
        self._parts = [
            Part(optimizer, after=hook(partial(self._on_update, place)))
            for place, optimizer in enumerate(self._optimizers)
        ]
        self._waiting: dict[nn.Parameter, _Watched] = {}
        self._settled: set[nn.Parameter] = set()
        self._problems: dict[nn.Parameter, Problem] = {}
        self._gradients: dict[nn.Parameter, Tensor | None] = {}  # of the step before a check
        self._asked: tuple[HostTransfer, Callable[[np.ndarray], None]] | None = None
        self._incomplete = True
        self._steps = 0
        self.unheld = Unheld()
        self._idle = [False] * len(self._optimizers)  # what it holds of others is, as far as known
        self._arm()

    @property
    def findings(self) -> list[Finding]:
        """Tensors that did not change, as of the last check."""
        problems = [*self._problems.values(), *self._silent()]
        return to_findings(problems)

    @property
    def updates(self) -> int:
        """The steps that the optimizers have made, all together."""
        return sum(part.taken for part in self._parts)

    def include_new(self) -> None:
        """After tensors were added or removed: watches the new ones from the next step on."""
        self._incomplete = True

    def restart(self) -> None:
        """After values were restored or loaded: discards the copied elements."""
        self._waiting.clear()
        self._problems.clear()
        self._asked = None
        self._incomplete = True
        self.unheld.still.clear()

    def step(self) -> bool:
        """True after a check, so that :attr:`findings` may have changed."""
        self._steps += 1
        answered = self._take_answer()
        if self._incomplete:
            self._remember()
        checks = not self._steps % STEPS and bool(self._waiting or self._problems)
        if checks:
            self._look()
        self._arm()
        return checks or answered or self._steps == SILENT_STEPS

    @property
    def idle_steps(self) -> int:
        """In so many steps from now nothing is due, so that :meth:`skip` may stand for them."""
        if self._asked is not None or self._incomplete:
            return 0
        last = SILENT_STEPS - 1 if self._steps < SILENT_STEPS else sys.maxsize
        if self._waiting or self._problems:  # the step before a check is due too: it arms the hook
            last = min(last, self._steps + max(0, STEPS - 2 - self._steps % STEPS))
        return last - self._steps

    def skip(self, steps: int) -> None:
        """As so many calls of :meth:`step` in which nothing is due."""
        self._steps += steps

    def close(self) -> None:
        for part in self._parts:
            part.remove()

    def _arm(self) -> None:
        """A step of an optimizer is looked at while it is new, and before a check."""
        reads = bool(self._waiting) and not (self._steps + 1) % STEPS
        for part in self._parts:
            part.arm(reads or part.taken < NOTICED_STEPS)

    def _on_update(self, place: int, optimizer: torch.optim.Optimizer) -> None:
        if self._parts[place].taken <= NOTICED_STEPS:
            notice_scaler(optimizer)
        if self._steps == 0:
            self._notice_foreign(place, optimizer)
        if self._waiting and not (self._steps + 1) % STEPS:
            self._keep_gradients(place)

    def _notice_foreign(self, place: int, optimizer: torch.optim.Optimizer) -> None:
        """Copies of the model's tensors would have a gradient now, or state."""
        known = {id(p) for _, p in named_holders(self._model)}
        foreign = [p for p in parameters_of(optimizer) if id(p) not in known]
        learns = any(p.grad is not None or optimizer.state.get(p) for p in foreign)
        self._idle[place] = not learns
        self.unheld.foreign_idle = all(self._idle)

    @torch.no_grad()
    def _keep_gradients(self, place: int) -> None:
        """At the end of a step: the script may clear the gradients before the check."""
        for parameter, watched in self._waiting.items():
            gradient = parameter.grad
            if watched.optimizer == place and gradient is not None:
                kept = None if gradient.layout is not torch.strided else _sample(gradient).clone()
                self._gradients[parameter] = kept

    def _silent(self) -> Iterator[Problem]:
        for place, part in enumerate(self._parts):
            if not part.taken and self._steps >= SILENT_STEPS:
                kind = type(self._optimizers[place]).__name__
                yield Problem(
                    "",
                    Severity.SERIOUS,
                    f"{kind} made no step in {SILENT_STEPS} steps of the session",
                    "call optimizer.step() before session.step(loss)",
                )

    @torch.no_grad()
    def _remember(self) -> None:
        self._incomplete = False
        names = {parameter: name for name, parameter in named_holders(self._model)}
        for known in (self._waiting, self._problems, self.unheld.still):
            for gone in [parameter for parameter in known if parameter not in names]:
                del known[gone]
        self._settled &= names.keys()
        self.unheld.moved &= names.keys()
        for place, optimizer in enumerate(self._optimizers):
            grafts = (p for companion in companions_of(optimizer) for p in companion.parameters)
            for parameter in (*parameters_of(optimizer), *grafts):
                if parameter in names and self._is_new(parameter):
                    self._waiting[parameter] = _Watched(
                        names[parameter],
                        parameter,
                        _sample(parameter).clone(),
                        place,
                        self._parts[place].taken,
                    )
        self._remember_unheld(names)

    def _remember_unheld(self, names: dict[nn.Parameter, str]) -> None:
        held = {id(p) for o in with_companions(self._optimizers) for p in parameters_of(o)}
        for parameter, name in names.items():
            if self._parts and id(parameter) not in held and self._is_new(parameter):
                sample = _sample(parameter).clone()
                since = self._parts[0].taken
                self._waiting[parameter] = _Watched(name, parameter, sample, 0, since)

    def _is_new(self, parameter: nn.Parameter) -> bool:
        return (
            parameter.requires_grad
            and _has_numbers(parameter)
            and not (parameter in self._settled or parameter in self._waiting)
        )

    def _ask(self, flags: Sequence[Tensor], then: Callable[[np.ndarray], None]) -> None:
        """Calls ``then`` with the numbers; on a GPU in the next step, so that nothing waits."""
        transfer = HostTransfer()
        transfer.add("flags", flags)
        transfer.start()
        if transfer.is_late:
            self._asked = transfer, then
        else:
            then(transfer.take("flags"))

    def _take_answer(self) -> bool:
        asked, self._asked = self._asked, None
        if asked is None:
            return False
        transfer, then = asked
        then(transfer.take("flags"))
        return True

    @torch.no_grad()
    def _look(self) -> None:
        due = [
            watched
            for watched in self._waiting.values()
            if self._parts[watched.optimizer].taken - watched.since >= STEPS
            and _is_comparable(watched)
        ]
        differs = [(_sample(w.parameter) != w.sample).any() for w in due]
        self._ask(differs, partial(self._on_moved, due))

    def _taken_since(self, watched: _Watched) -> int:
        return self._parts[watched.optimizer].taken - watched.since

    def _on_moved(self, due: Sequence[_Watched], moved: np.ndarray) -> None:
        """What has moved is settled; of the rest, look for evidence that it should have."""
        held = with_companions(self._optimizers)
        groups = {p: g for o in held for g in o.param_groups for p in g["params"]}
        # Where no tensor has a gradient, there is no evidence.
        known = bool(self._gradients) or any(p.grad is not None for p in groups)
        doubtful, evidence = [], []
        for watched, has_moved in zip(due, moved, strict=True):
            self._problems.pop(watched.parameter, None)
            if watched.parameter not in self._waiting:
                continue
            if has_moved:
                del self._waiting[watched.parameter]
                self.unheld.still.pop(watched.parameter, None)
                self._settled.add(watched.parameter)
                if watched.parameter not in groups:
                    self.unheld.moved.add(watched.parameter)
            elif watched.parameter not in groups:
                parameter = watched.parameter
                has_gradient = parameter in self._gradients or parameter.grad is not None
                self.unheld.still[parameter] = has_gradient
            elif known:
                found = self._judge(watched, groups[watched.parameter])
                if isinstance(found, Problem):
                    self._problems[watched.parameter] = found
                elif found is not None:
                    doubtful.append(watched)
                    evidence.append(found)
        self._gradients.clear()
        if doubtful:
            self._ask(evidence, partial(self._on_evidence, doubtful))

    def _on_evidence(self, doubtful: Sequence[_Watched], should_move: np.ndarray) -> None:
        for watched, wrong in zip(doubtful, should_move, strict=True):
            if wrong and watched.parameter in self._waiting:
                self._problems[watched.parameter] = _unmoved(watched)

    def _judge(self, watched: _Watched, group: dict[str, Any]) -> Problem | Tensor | None:
        """Of an unchanged tensor: the problem, or a bool on its device that tells; or neither."""
        lr = group.get("lr")
        if not watched.parameter.requires_grad or (lr is not None and _is_zero(lr)):
            return None
        if watched.parameter in self._gradients:
            return _should_move(watched, self._gradients[watched.parameter], group)
        if watched.parameter.grad is not None:
            gradient = watched.parameter.grad
            sample = None if gradient.layout is not torch.strided else _sample(gradient)
            return _should_move(watched, sample, group)
        host, slot, _ = watched.name.partition(f".{SLOT_NAME}.")
        if not slot:
            return Problem(
                watched.name,
                Severity.INFO,
                f"has not changed in {STEPS} steps and has no gradient: the loss does not "
                "depend on it",
                "check that its layer is called; freeze it if this is intended",
            )
        return Problem(
            watched.name,
            Severity.SERIOUS,
            f"the graft learns nothing: no gradient has reached it in {STEPS} steps, because the "
            f"loss does not depend on {_grafted_output(self._model.get_submodule(host))}",
            "remove it, and graft into a layer whose output the model uses",
        )


def _has_numbers(parameter: Tensor) -> bool:
    """False for a tensor whose elements cannot be compared: on the meta device, lazy, or empty."""
    if is_lazy(parameter) or parameter.is_meta or parameter.layout is not torch.strided:
        return False
    return not parameter.is_nested and local(parameter).numel() > 0


def _is_comparable(watched: _Watched) -> bool:
    """False while FSDP has a layer's whole weights in the place of this rank's part."""
    return _sample(watched.parameter).shape == watched.sample.shape


def _sample(tensor: Tensor) -> Tensor:
    """A view of at most some 100 elements of those on this rank, spread over all axes."""
    tensor = local(tensor)
    many = _SAMPLED.get(tensor.dim(), 3)
    steps = [slice(None, None, max(1, -(-size // many))) for size in tensor.shape]
    return tensor.detach()[tuple(steps)]


def _grafted_output(host: nn.Module) -> str:
    if isinstance(host, nn.RNNBase):
        return "the outputs of all steps, which it changes; it does not change the last state (h_n)"
    return "its layer's output"


def _is_zero(lr: float | Tensor) -> bool:
    """False for a rate on a GPU, which is compared there."""
    if isinstance(lr, Tensor):
        return not is_late(lr) and float(lr) == 0.0
    return lr == 0.0


@torch.no_grad()
def _should_move(watched: _Watched, sample: Tensor | None, group: dict[str, Any]) -> Tensor | None:
    """A bool of shape [] on the device: its gradient would have changed it. None: not known.

    Args:
        sample: of its gradient; None for a sparse one.
    """
    parameter, lr = watched.parameter, group.get("lr")
    if sample is None or is_warming(group):
        return None
    slope, value = sample.abs(), watched.sample.abs()
    found = slope.isfinite().all() & (slope.max() > SMALLEST_GRADIENT)
    if isinstance(lr, Tensor):
        found = found & (lr != 0)
    if lr is not None and parameter.dtype in (torch.float32, torch.float64):
        found = found & (slope * lr >= torch.finfo(parameter.dtype).eps * value).any()
    return found


def _unmoved(watched: _Watched) -> Problem:
    return Problem(
        watched.name,
        Severity.SERIOUS,
        f"has a gradient, but has not changed in {STEPS} steps of its optimizer",
        "the steps do not reach it, or are too small for its "
        f"{str(watched.parameter.dtype).removeprefix('torch.')} numbers",
    )
