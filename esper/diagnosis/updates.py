"""How large an update is where the learning rate is sound, relative to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from esper.diagnosis.facts import UpdateSettings
from esper.grafting.optimizers import is_torchs_own, unwrap_optimizer
from esper.health.transfers import is_late

# Median over the matrices of healthy runs of the benchmark, seeds 0 to 9: the first update of Adam
# is 0.004 to 0.014 of the weights, later ones 0.001 to 0.004; SGD with a momentum of 0.9 begins
# with 0.0001 to 0.0009, and has 0.001 to 0.002 from step 10 on.
STEADY = 3e-3
FIRST_OF_ADAPTIVE = 7e-3
MATCHED = 2e-3  # to which a new rate of SGD is brought: the upper end of those
LATER_OF_ADAGRAD = 100  # updates, after which one is a tenth of the first
FIRST_UPDATES = 10  # Adam's mean of the gradients spans so many
EXCESSIVE = 10.0  # times a sound update
BY_DECAY = 1.1  # update / weight decay, below which the gradient has no part in it
OF_THE_WEIGHTS = ("AdamW", "Muon")  # their weight decay is no part of the gradient


def is_decay_alone(update: float, settings: UpdateSettings) -> bool:
    """The weights move because their decay takes a share of them, and hardly by the gradient.

    A higher rate would raise the decay too.

    Args:
        update: relative to the weights.
    """
    return 0 < update < BY_DECAY * settings.decay


def sound_update(optimizers: Iterable[torch.optim.Optimizer], updates: int) -> float:
    """Share of the weights that an update moves at a sound rate.

    An adaptive optimizer divides the first gradients by their own size, so its first updates are
    its largest. Those of SGD grow with its momentum m, to 1 / (1 - m) of the first.

    Args:
        updates: how many there were since the run began, this one too.

    Returns:
        Infinity for an optimizer that finds the size by itself.
    """
    sound = [_of(unwrap_optimizer(optimizer), max(1, updates)) for optimizer in optimizers]
    return max(sound, default=STEADY)


def overshoot(optimizers: Iterable[torch.optim.Optimizer], updates: int) -> float:
    """How many times larger an early update is than a later one of the same gradient.

    RMSprop divides by a mean of squares that begins at zero, and does not correct it as Adam does:
    its first update is ten times its learning rate. Adagrad divides by the root of their sum, so
    its updates fall with the root of their number.
    """
    own = [unwrap_optimizer(optimizer) for optimizer in optimizers]
    groups = (g for o in own if isinstance(o, torch.optim.RMSprop) for g in o.param_groups)
    decays = (min(float(group["alpha"]), 0.9999) for group in groups)
    found = [(1.0 - decay ** max(1, updates)) ** -0.5 for decay in decays]
    if any(isinstance(o, torch.optim.Adagrad) for o in own):
        found.append((LATER_OF_ADAGRAD / max(1, updates)) ** 0.5)
    return max(1.0, *found) if found else 1.0


def searches(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """One finds the size of its updates by itself: no size of them is a fault of the rate.

    Each update of L-BFGS has several evaluations of the loss, and goes as far as these allow.
    """
    return any(isinstance(unwrap_optimizer(o), torch.optim.LBFGS) for o in optimizers)


def estimates_rate(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """One estimates its rate from the path so far, as Prodigy and D-Adaptation do.

    Its ``lr`` is a factor of the estimate ``d``, which begins far too low on purpose.
    """
    groups = (g for optimizer in optimizers for g in unwrap_optimizer(optimizer).param_groups)
    return any("d" in group and "lr" in group for group in groups)


def may_warm_up(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """One is not torch's own, so it may warm up by itself, from a rate of zero."""
    return not all(is_torchs_own(unwrap_optimizer(optimizer)) for optimizer in optimizers)


def follows_gradient(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """The updates are as large as the gradient, in all of them; others divide it by its size."""
    return all(isinstance(unwrap_optimizer(optimizer), torch.optim.SGD) for optimizer in optimizers)


def settings_of(optimizer: torch.optim.Optimizer) -> UpdateSettings:
    """Inside its step; nothing of an optimizer that is not torch's own."""
    own = unwrap_optimizer(optimizer)
    found = UpdateSettings()
    if is_torchs_own(own):
        for group in own.param_groups:
            found = strongest(found, _settings_of_group(own, group))
    return found


def strongest(one: UpdateSettings, other: UpdateSettings) -> UpdateSettings:
    """The larger value of each."""
    return UpdateSettings(*map(max, one, other))


def _settings_of_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> UpdateSettings:
    rate, decay = _known(group.get("lr")), _known(group.get("weight_decay"))
    if isinstance(optimizer, torch.optim.SGD):
        momentum = _known(group.get("momentum"))
        kept = (1.0 - _known(group.get("dampening"))) if momentum else 1.0
        return UpdateSettings(rate * decay * kept / (1.0 - min(momentum, 0.999)), 0.0, momentum)
    found = UpdateSettings(first_beta=_first_beta(group), eps=_known(group.get("eps")))
    if type(optimizer).__name__ in OF_THE_WEIGHTS or group.get("decoupled_weight_decay"):
        return found._replace(decay=rate * decay)
    return found._replace(decay_in_gradient=decay)


def _first_beta(group: dict[str, Any]) -> float:
    """Where the second one is smaller; else 0."""
    betas = group.get("betas")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        return 0.0
    first, second = map(_known, betas)
    return first if 0 < second < first else 0.0


def _known(value: Any) -> float:
    """0 for a number that only a GPU knows, and for what is no number."""
    if not isinstance(value, int | float | torch.Tensor):
        return 0.0
    return 0.0 if isinstance(value, torch.Tensor) and is_late(value) else float(value)


def _of(optimizer: torch.optim.Optimizer, updates: int) -> float:
    if searches([optimizer]):
        return math.inf
    if not isinstance(optimizer, torch.optim.SGD):
        sound = FIRST_OF_ADAPTIVE if updates <= FIRST_UPDATES else STEADY
        return sound * overshoot([optimizer], updates)
    momentum = max(
        (float(group.get("momentum", 0.0)) for group in optimizer.param_groups), default=0.0
    )
    return STEADY * (1.0 - min(momentum, 0.99) ** updates)
