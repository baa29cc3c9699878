"""Companions: each graft's weights have an optimizer of their own, which steps after the host's.

    host's optimizer steps → its post-step hook → each companion steps, at the host's present rate
The host's groups, state, schedulers and state dicts are those of a run without grafts: a companion
reads the group of the layer in each step, so it follows every scheduler, and any other line that
writes into a group. New weights get fresh state and a warm-up without weight decay. Enlarging a
tensor and padding its moments overshot six-fold or starved in measurements (reference/growth.md,
section 6.3); a group in the host's own optimizer broke schedulers, counters and state dicts
(docs/decisions/0007).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from esper.fail_closed import contained, is_the_scripts, short
from esper.grafting.companions.clipping import Clipping
from esper.grafting.companions.gradients import HostGradients, Passes
from esper.grafting.companions.making import (
    MODES,
    Made,
    follow,
    grows_with_gradient,
    has_modes,
    make_like,
    make_plain,
    set_mode,
    why_not,
)
from esper.grafting.companions.scaling import Unscaler, noticed_scaler, scaler_of_this_step
from esper.grafting.hooks import after_closure
from esper.grafting.optimizers import parameters_of, unwrap_optimizer

logger = logging.getLogger("esper")

WARMUP_STEPS = 100
# Entries of a companion's group; plain numbers, so that its state dict includes them.
_TAKEN = "esper_steps"
_WARMUP = "esper_warmup_steps"


@dataclass(slots=True, eq=False)
class Companion:
    """Trains the weights of one graft. Made by :func:`accompany`.

    Attributes:
        layer: name of the grafted layer.
        parameters: the weights that it trains, and no others.
        error: why it makes no more steps; empty while it does.
    """

    layer: str
    parameters: tuple[nn.Parameter, ...]
    error: str = ""
    _made: Made = field(repr=False, kw_only=True)
    _anchor: _Anchor = field(repr=False, kw_only=True)
    _company: _Company = field(repr=False, kw_only=True)
    _handles: list[RemovableHandle] = field(repr=False, default_factory=list)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._made.optimizer

    @property
    def unrepeated(self) -> bool:
        """The loop changes the host's gradients in a way that is not repeated on the graft's."""
        return self._company.clipping.unrepeated

    @property
    def note(self) -> str:
        """Why it is not of the host optimizer's class; empty if it is."""
        return self._made.note

    def leave(self) -> None:
        """Ends it, for example because its graft is taken out; a second call does nothing."""
        self._company.remove(self)

    def reach(self) -> None:
        """A backward pass has reached the graft, for weights whose own hooks do not run."""
        self._company.reach()

    def step(self, host: torch.optim.Optimizer) -> None:
        """One step, with the present hyper-parameters of the layer's group in ``host``."""
        self._leave_to(host)
        own = self.optimizer.param_groups[0]
        if not own["params"]:
            return
        follow(self._made, self._anchor.group_in(host))
        if is_warming(own):
            # Adafactor with relative steps has no rate to lower.
            if own.get("lr") is not None:
                own["lr"] = own["lr"] * ((own[_TAKEN] + 1) / own[_WARMUP])
            if "weight_decay" in own:
                own["weight_decay"] = 0.0
        self.optimizer.step()
        own[_TAKEN] += 1

    def _leave_to(self, host: torch.optim.Optimizer) -> None:
        """What the script has put into its own optimizer since is trained by that one alone."""
        held, own = set(map(id, parameters_of(host))), self.optimizer.param_groups[0]
        taken = [p for p in own["params"] if id(p) in held]
        if not taken:
            return
        for parameter in taken:
            self.optimizer.state.pop(parameter, None)
        own["params"] = [p for p in own["params"] if id(p) not in held]
        self._company.release(self, held)

    def follow_mode(self, mode: str) -> None:
        """The host's optimizer was set to ``train`` or ``eval``; an error ends this companion."""
        try:
            set_mode(self.optimizer, mode)
        except Exception as error:
            if is_the_scripts(error):
                raise
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """It makes no more steps, and the audit says so."""
        self.error = short(error)
        text = "%s: the graft learns no more, its optimizer failed: %s"
        logger.warning(text, self.layer, self.error, exc_info=error)


class _Anchor:
    """Finds the group of a host's optimizer that a layer belongs to, wherever it is now.

    Loading a state dict replaces the groups, and the user may add some.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layer: nn.Module | None) -> None:
        own = set() if layer is None else set(map(id, layer.parameters()))
        self._weights = [p for p in parameters_of(optimizer) if id(p) in own]
        self._place = 0

    def group_in(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The first group where the layer has no weights in the optimizer."""
        groups, weights = optimizer.param_groups, set(map(id, self._weights))
        places = [place for place in (self._place, *range(len(groups))) if place < len(groups)]
        holds = (p for p in places if any(id(w) in weights for w in groups[p]["params"]))
        self._place = next(holds, places[0])
        group: dict[str, Any] = groups[self._place]
        return group


class _Company:
    """The companions of one optimizer, and the hooks that let them step with it.

    After a step the loop clears the host's gradients at some time, or it does not. Where they are
    freed, the grafts' are put aside at once. Whether they are dropped then, or added to, is decided
    at the next backward pass or step, when it can be seen.
    """

    def __init__(self, host: torch.optim.Optimizer, scaler: Any) -> None:
        self.members: list[Companion] = []
        self.gradients = HostGradients(host)
        self.clipping = Clipping()
        self._host = weakref.ref(host)
        scaler = scaler if scaler is not None else noticed_scaler(host)
        self.unscaler = None if scaler is None else Unscaler(scaler)
        self._handles: list[RemovableHandle] = []
        self._modes: list[_Mode] = []
        self._aside: list[tuple[nn.Parameter, Tensor]] = []
        self._awaits_step = False
        self._reached = False  # a gradient has arrived since the last step
        self._left = False  # the gradients of the last step are there, or aside
        self._passes = Passes()
        self._leaves_out = False

    def add(self, companion: Companion, host: torch.optim.Optimizer) -> None:
        if not self._handles:
            self._handles = [
                host.register_step_pre_hook(_StepHook(self, host, self._before_step)),
                host.register_step_post_hook(_Hook(self, host, self._after_step)),
            ]
            self._modes = [_Mode(self, host, mode) for mode in MODES if has_modes(host)]
            self.gradients.end_step(self._put_aside)
        self.members.append(companion)
        arrives = contained("gradient hook", "A graft's gradients are not cleared with the host's.")
        for parameter in companion.parameters:
            register: Any = parameter.register_hook
            # Another process that the model is sent to has no host to follow, and torch would warn.
            unpickled: Any = unserializable_hook
            companion._handles.append(register(unpickled(arrives(self._arrives))))

    def remove(self, companion: Companion) -> None:
        if companion not in self.members:
            return
        self.members.remove(companion)
        for handle in companion._handles:
            handle.remove()
        companion._handles.clear()
        if not self.members:
            ends: list[RemovableHandle | _Mode] = [*self._handles, *self._modes]
            for end in ends:
                end.remove()
            self._handles.clear()
            self._modes.clear()

    def release(self, companion: Companion, held: set[int]) -> None:
        """The gradients of some of its parameters are the host's own from now on."""
        for parameter, handle in zip(companion.parameters, companion._handles, strict=True):
            if id(parameter) in held:
                handle.remove()
        pairs = zip(companion.parameters, companion._handles, strict=True)
        kept = [(p, handle) for p, handle in pairs if id(p) not in held]
        companion.parameters = tuple(p for p, _ in kept)
        companion._handles = [handle for _, handle in kept]

    def clear(self) -> None:
        """Clears the gradients of all grafts."""
        self._aside.clear()
        self._left = False
        for parameter in self._parameters():
            parameter.grad = None
        if self.unscaler is not None:
            self.unscaler.forget()

    def restart(self) -> None:
        """The host's gradients were restored, and the grafts' with them."""
        self._aside.clear()
        self.clipping.forget()
        self.gradients.end_step(self._put_aside)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for companion in self.members for p in companion.parameters]

    # -- in the user's backward pass and step --------------------------------------------------

    def _arrives(self, gradient: Tensor) -> Tensor | None:
        """A gradient of a graft, before it is accumulated; returns what is accumulated instead."""
        self.reach()
        if self._leaves_out:
            return torch.zeros_like(gradient)
        return None if self.unscaler is None else self.unscaler.arrived(gradient)

    def reach(self) -> None:
        """A backward pass has reached a graft, and has not accumulated its gradients yet."""
        if self._passes.is_new():
            self._begin_pass()

    def _begin_pass(self) -> None:
        self._reached = True
        inside, raised = self._passes.begin(at_end=self._end_pass)
        # After an error, such as too little memory, a loop drops what there is and goes on.
        if raised or (not inside and self.gradients.cleared()):
            self.clear()
        self._put_back()
        self._leaves_out = self.gradients.left_out()

    def _end_pass(self) -> None:
        self.gradients.mark()
        # DDP writes the averages in a callback that it has queued for the end of the pass.
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._mark_for_clipping)

    def _mark_for_clipping(self) -> None:
        host = self._host()
        self.clipping.mark([] if host is None else parameters_of(host), self._parameters())

    def _put_back(self) -> None:
        """The gradients of the last step, which the loop has not cleared."""
        for parameter, gradient in self._aside:
            parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
        self._aside.clear()

    def _before_step(self, host: torch.optim.Optimizer) -> None:
        self._awaits_step = True
        if self.unscaler is None and (scaler := scaler_of_this_step()) is not None:
            self.unscaler = Unscaler(scaler, used=False)  # so far nothing was divided

    def complete(self, host: torch.optim.Optimizer) -> None:
        """The gradients of a step are complete: the graft's are clipped as the host's are."""
        self.clipping.repeat(None if self.unscaler is None else self.unscaler.applied_to(host))

    def _after_step(self, host: torch.optim.Optimizer) -> None:
        # A class whose step calls its parent's runs the hooks of a step twice.
        if not self._awaits_step:
            return
        self._awaits_step = False
        # Gradients that came in a way that runs no hook, as those of sharded tensors do.
        unnoticed = not (self._reached or self._left)
        if self._left and not self._reached and self.gradients.cleared():
            self.clear()
        self._put_back()
        for companion in self.members:
            self._step(companion, host)
        self._reached, self._left = False, True
        self.gradients.end_step(self._put_aside)
        if unnoticed:
            self.clear()

    def _put_aside(self) -> None:
        """The host's gradients were freed after a step."""
        self._aside += [(p, p.grad) for p in self._parameters() if p.grad is not None]
        for parameter, _ in self._aside:
            parameter.grad = None

    def _step(self, companion: Companion, host: torch.optim.Optimizer) -> None:
        if companion.error:
            return
        try:
            if self.unscaler is None or self.unscaler.allows(host, companion.parameters):
                companion.step(host)
        except Exception as error:
            if is_the_scripts(error):
                raise
            companion.fail(error)


class _Hook:
    """A step hook of one optimizer; in a copy or a pickle of that optimizer it does nothing."""

    def __init__(self, company: _Company, host: torch.optim.Optimizer, act: Any) -> None:
        self.company = company
        self._host = id(host)
        self._act = contained("companion", "The weights of grafts do not change any more.")(act)

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if id(optimizer) == self._host:
            self._act(optimizer)

    def __reduce__(self) -> Any:
        return _no_hook, ()


class _StepHook(_Hook):
    """The hook before a step. The gradients of a step with a closure are complete after that."""

    def __init__(self, company: _Company, host: torch.optim.Optimizer, act: Any) -> None:
        super().__init__(company, host, act)
        clips = contained("clipping", "A graft's gradients are not clipped with the host's.")
        self._complete = clips(company.complete)

    def __call__(self, optimizer: torch.optim.Optimizer, *given: Any) -> Any:
        super().__call__(optimizer)
        if id(optimizer) != self._host or len(given) != 2:
            return None
        return after_closure(*given, lambda: self._complete(optimizer))


class _Mode:
    """``train`` or ``eval`` of a schedule-free optimizer, which its companions follow at once.

    The one call of an optimizer that is wrapped, on the object alone: it moves the weights, between
    those that are trained and those that are evaluated and saved, and nothing else tells of it. A
    copy or a pickle of the optimizer has its class's own.
    """

    def __init__(self, company: _Company, host: torch.optim.Optimizer, mode: str) -> None:
        self._company = company
        self._host = host
        self._mode = mode
        self._before = vars(host).get(mode)
        self._call = getattr(host, mode)
        setattr(host, mode, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._call(*args, **kwargs)
        for companion in self._company.members:
            companion.follow_mode(self._mode)
        return result

    def __reduce__(self) -> Any:
        return getattr, (self._host, self._mode)

    def remove(self) -> None:
        if vars(self._host).get(self._mode) is self:
            delattr(self._host, self._mode)
            if self._before is not None:
                setattr(self._host, self._mode, self._before)


def _no_hook() -> Any:
    return _do_nothing


def _do_nothing(*_: Any) -> None:
    """Takes the place of a hook in a copied optimizer."""


def accompany(
    optimizer: Any,
    parameters: Sequence[nn.Parameter],
    *,
    layer: str,
    host: nn.Module | None = None,
    others: Sequence[Any] = (),
    amplification: float = 1.0,
    scaler: Any = None,
    warmup_steps: int = WARMUP_STEPS,
) -> Companion:
    """Lets ``parameters`` be trained beside ``optimizer``, whose groups and state stay as they are.

    They get an optimizer of the same class, with the hyper-parameters of the layer's group in each
    step. During ``warmup_steps`` the learning rate rises linearly to that group's, and weight decay
    is zero. Where the class cannot train them, the first of ``others`` that can takes its place,
    else a plain AdamW does; :attr:`Companion.note` says so.

    Args:
        layer: name of the layer.
        host: the layer whose group provides the hyper-parameters; None: the first group.
        others: further optimizers of the run.
        amplification: of the graft. Where steps grow with the gradient, as SGD's do, the rate is
            divided by its square.
        scaler: the ``GradScaler`` that makes the optimizer's steps; one that is not named is
            noticed at the first step.

    Raises:
        GraftError: the optimizer has no hooks for its steps.
    """
    wanted = unwrap_optimizer(optimizer)
    several = [wanted, *(o for o in map(unwrap_optimizer, others) if o is not wanted)]
    groups = [(o, (anchor := _Anchor(o, host)), anchor.group_in(o)) for o in several]
    reasons = [why_not(o, group, parameters) for o, _, group in groups]
    place = reasons.index("") if "" in reasons else 0
    inner, anchor, group = groups[place]
    if reasons[place]:
        made = make_plain(group, parameters)
        rate = made.optimizer.param_groups[0]["lr"]
        made = replace(made, note=f"{reasons[0]}; a plain AdamW does, at a rate of {rate:.3g}")
    else:
        made = make_like(inner, group, parameters)
        if place:
            lent = f"one like the run's {type(inner).__name__} does, at its rate"
            made = replace(made, note=f"{reasons[0]}; {lent}")
    if amplification > 0 and amplification != 1.0 and grows_with_gradient(made, parameters):
        made = replace(made, rate=made.rate / amplification**2)
        follow(made, group)
    made.optimizer.param_groups[0].update({_TAKEN: 0, _WARMUP: warmup_steps})
    set_mode(made.optimizer, "train" if group.get("train_mode", True) else "eval")
    company = _company_of(inner) or _Company(inner, scaler)
    companion = Companion(layer, tuple(parameters), _made=made, _anchor=anchor, _company=company)
    company.add(companion, inner)
    if made.note:
        logger.info("%s: %s", layer, made.note)
    return companion


def companions_of(optimizer: Any) -> tuple[Companion, ...]:
    """Those that step with ``optimizer``, oldest first."""
    company = _company_of(unwrap_optimizer(optimizer))
    return () if company is None else tuple(company.members)


def with_companions(optimizers: Iterable[Any]) -> list[torch.optim.Optimizer]:
    """The optimizers, each followed by those of its companions."""
    found = []
    for optimizer in map(unwrap_optimizer, optimizers):
        found += [optimizer, *(companion.optimizer for companion in companions_of(optimizer))]
    return found


def dismiss(parameters: Iterable[Tensor], optimizers: Iterable[Any]) -> None:
    """Ends each companion that trains one of ``parameters``."""
    gone = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        for companion in companions_of(optimizer):
            if any(id(parameter) in gone for parameter in companion.parameters):
                companion.leave()


def put_back(optimizer: torch.optim.Optimizer, members: Sequence[Companion]) -> None:
    """Makes ``members`` the companions of the optimizer, for a snapshot that is restored.

    The gradients must be as they were. The state of the companions' optimizers is not touched.
    """
    for companion in companions_of(optimizer):
        if companion not in members:
            companion.leave()
    for companion in members:
        if companion not in companions_of(optimizer):
            companion._company = _company_of(optimizer) or companion._company
            companion._company.add(companion, optimizer)
    company = _company_of(optimizer)
    if company is not None:
        company.members[:] = members  # in the order of that moment
        company.restart()


def is_warming(group: dict[str, Any]) -> bool:
    """The group is a companion's, whose learning rate is still rising to its full value."""
    return _TAKEN in group and group[_TAKEN] < group[_WARMUP]


def _company_of(optimizer: torch.optim.Optimizer) -> _Company | None:
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", {}).values()
    found = (h.company for h in hooks if isinstance(h, _Hook) and h._host == id(optimizer))
    return next(found, None)
