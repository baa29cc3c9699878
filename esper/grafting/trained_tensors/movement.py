"""Finds tensors that should learn and do not; checks them a few times, not in each step.

A few elements of each trainable tensor are copied, and compared after some steps of its optimizer.
Where they have not changed, those with the largest gradients are copied instead: the pixels at the
border of an image may be zero in all images. What still does not change is looked at ever more
rarely. An unchanged tensor is a finding only with evidence: these elements have a gradient that the
steps did not apply, or there is no gradient at all. It is no finding if the learning rate is zero,
new weights still warm up, the gradient is zero or not finite, or rounding removes the step.
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
from esper.grafting.companions.companion import companions_of, is_warming, with_companions
from esper.grafting.companions.scaling import notice_scaler
from esper.grafting.optimizers import parameters_of, unwrap_optimizer
from esper.grafting.slot import SLOT_NAME
from esper.grafting.trained_tensors.ledger import Problem, to_findings
from esper.grafting.trained_tensors.orphans import Unheld
from esper.health.transfers import HostTransfer, is_late
from esper.health.updates import Part
from esper.sharding import local, named_holders

NOTICED_STEPS = 3  # of an optimizer, in which a scaler that was not named is looked for
STEPS = 20  # of its optimizer before a tensor is checked
MOST_STEPS = 160  # of the session between two checks
CHOSEN = 64  # elements with the largest gradients
CHOSEN_AMONG = 1_000_000  # elements of a tensor, to bound what the choice costs
SILENT_STEPS = 200  # of the session without a step of the optimizer; accumulation is rarely longer
SMALLEST_GRADIENT = 1e-7  # a smaller one may be the rounding error of a zero gradient
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAMPLED = {0: 1, 1: 64, 2: 8, 3: 4}  # axes -> elements of each axis


@dataclass(slots=True)
class _Watched:
    name: str
    parameter: nn.Parameter
    sample: Tensor
    optimizer: int  # place
    since: int  # steps of its optimizer at that time
    still: bool = False  # it had not changed at its last check
    places: Tensor | None = None  # of the sample's elements, where they were chosen
    among: int = 0  # elements of the tensor then

    def now(self, tensor: Tensor) -> Tensor:
        """The elements of the sample, of the parameter or of its gradient."""
        return _sample(tensor) if self.places is None else _at(tensor, self.places)

    def choose(self, gradient: Tensor, taken: int) -> None:
        """Takes the elements with the largest gradients from here on."""
        self.places, self.among = _largest(gradient), gradient.numel()
        self.sample, self.since = _at(self.parameter, self.places).clone(), taken


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
        self._apart = STEPS
        self._next = STEPS  # the step of the next check
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
        checks = self._steps >= self._next and bool(self._waiting or self._problems)
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
            last = min(last, max(self._steps, self._next - 2))
        return last - self._steps

    def skip(self, steps: int) -> None:
        """As so many calls of :meth:`step` in which nothing is due."""
        self._steps += steps

    def close(self) -> None:
        for part in self._parts:
            part.remove()

    def _arm(self) -> None:
        """A step of an optimizer is looked at while it is new, and before a check."""
        reads = bool(self._waiting) and self._steps + 1 >= self._next
        for part in self._parts:
            part.arm(reads or part.taken < NOTICED_STEPS)

    def _on_update(self, place: int, optimizer: torch.optim.Optimizer) -> None:
        if self._parts[place].taken <= NOTICED_STEPS:
            notice_scaler(optimizer)
        if self._steps == 0:
            self._notice_foreign(place, optimizer)
        if self._waiting and self._steps + 1 >= self._next:
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
            if watched.optimizer != place or gradient is None:
                continue
            if gradient.layout is not torch.strided:
                self._gradients[parameter] = None
                continue
            if watched.still and watched.places is None and _may_choose(parameter, gradient):
                watched.choose(gradient, self._parts[place].taken)
            self._gradients[parameter] = watched.now(gradient).clone()

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
        watched = len(self._waiting)
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
        if len(self._waiting) > watched and not self._steps < self._next <= self._steps + STEPS:
            self._plan(STEPS)

    def _plan(self, apart: int) -> None:
        self._apart, self._next = apart, self._steps + apart

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
        self._plan(self._apart)
        differs = [(w.now(w.parameter) != w.sample).any() for w in due]
        self._ask(differs, partial(self._on_moved, due))

    def _on_moved(self, due: Sequence[_Watched], moved: np.ndarray) -> None:
        """What has moved is settled; of the rest, look for evidence that it should have."""
        held = with_companions(self._optimizers)
        groups = {p: g for o in held for g in o.param_groups for p in g["params"]}
        # Where no tensor has a gradient, there is no evidence.
        known = bool(self._gradients) or any(p.grad is not None for p in groups)
        doubtful, evidence, problems = [], [], set(self._problems)
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
                continue
            watched.still = True
            if watched.parameter not in groups:
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
        if due:
            changed = bool(moved.any()) or problems != set(self._problems)
            self._plan(STEPS if changed else min(2 * self._apart, MOST_STEPS))
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
            sample = None if gradient.layout is not torch.strided else watched.now(gradient)
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
    if watched.places is not None:
        return watched.parameter.numel() == watched.among
    return _sample(watched.parameter).shape == watched.sample.shape


def _may_choose(parameter: Tensor, gradient: Tensor) -> bool:
    """Both are plain tensors, and no part of one that is spread over ranks, whose places move."""
    plain = type(parameter) is nn.Parameter and type(gradient) is Tensor
    return plain and parameter.shape == gradient.shape and gradient.dtype in _PLAIN


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).index_select(0, places)


def _largest(gradient: Tensor) -> Tensor:
    """int64 [at most 64]: places of the elements with the largest gradients."""
    every = -(-gradient.numel() // CHOSEN_AMONG)
    sizes = gradient.detach().reshape(-1)[::every].abs()
    return sizes.topk(min(CHOSEN, sizes.numel())).indices * every


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
