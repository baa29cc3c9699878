"""Each rule finds its fault in a real small training, and is quiet in the twin without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.esper.diagnosis.small_runs import (
    Detached,
    Run,
    adam,
    circles,
    deep,
    digits,
    perceptron,
    scaled,
)


@dataclass(frozen=True)
class Case:
    """``within``: the step by which the fault must be found; ``layer``: where it began."""

    slug: str
    faulty: Callable[[], Run]
    healthy: Callable[[], Run]
    within: int
    layer: str | None = None


def spoil_input(run: Run, step: int) -> None:
    if step == 20:
        x, y = run.data
        run.data = (torch.full_like(x, float("nan")), y)


def kill_units(model: nn.Sequential, layer: int) -> nn.Sequential:
    with torch.no_grad():
        model[layer].bias.fill_(-100.0)
    return model


def only_norms(*, frozen: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10))
    for module in model:
        if isinstance(module, nn.Linear) and frozen:
            module.requires_grad_(False)
    return model


def stop_training_mode(run: Run, step: int) -> None:
    run.model.train(step < 20)


def raise_rate(run: Run, step: int) -> None:
    if step == 30:
        for group in run.opt.param_groups:
            group["lr"] *= 1000


def constant(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    return model


def holds_half(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(model.parameters())[:2], lr=1e-3)


def of_a_copy(model: nn.Module) -> torch.optim.Optimizer:
    """It holds the model's tensors, and makes steps that round away."""
    model.to(torch.bfloat16)
    return torch.optim.SGD(model.parameters(), lr=1e-7)


CASES = [
    Case("non_finite", lambda: Run(before=spoil_input), Run, 20),
    Case(
        "loss_spike", lambda: Run(before=raise_rate, optimizer=sgd), lambda: Run(optimizer=sgd), 50
    ),
    Case("gradients_not_zeroed", lambda: Run(zero_grad_every=1000), Run, 2),
    Case("accumulation_miscounted", lambda: Run(zero_grad_every=3), Run, 20),
    Case("not_held", lambda: Run(optimizer=holds_half), Run, 1, "3"),
    Case(
        "frozen_part",
        lambda: Run(only_norms(frozen=True)),
        lambda: Run(only_norms(frozen=False)),
        1,
        "0",
    ),
    Case(
        "unreached", lambda: Run(Detached(cut=True)), lambda: Run(Detached(cut=False)), 3, "middle"
    ),
    Case("nothing_moves", lambda: Run(optimizer=of_a_copy, data=halves()), Run, 3),
    Case(
        "training_in_eval_mode",
        lambda: Run(perceptron(0.1), before=stop_training_mode),
        lambda: Run(perceptron(0.1)),
        30,
    ),
    Case(
        "vanishing_gradient",
        lambda: Run(deep(10, nn.Sigmoid), circles()),
        lambda: Run(deep(6, nn.Tanh), circles()),
        3,
    ),
    Case(
        "exploding_gradient",
        lambda: Run(scaled(deep(12, nn.ReLU, width=16), 6.0), circles()),  # type: ignore[arg-type]
        lambda: Run(deep(12, nn.ReLU, width=16), circles()),
        10,
    ),
    Case("dying_relu", lambda: Run(kill_units(perceptron(), 3)), Run, 10, "3"),
    Case(
        "update_ratio_high",
        lambda: Run(optimizer=lambda model: adam(model, 1.0)),
        Run,
        50,
    ),
    Case("repeated_initialisation", lambda: Run(constant(perceptron())), Run, 1, "0"),
]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = digits()
    return x.bfloat16(), y


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.slug)
def test_the_fault_is_found_in_time(case: Case) -> None:
    torch.manual_seed(0)
    result = case.faulty().go()
    assert result.steps.get(case.slug, 10**6) <= case.within, result.steps
    finding = result.first(case.slug)
    assert case.layer is None or finding.layer == case.layer
    assert finding.observed
    assert finding.remedy
    assert finding.remedies
    assert 0 <= finding.since_step <= result.steps[case.slug] or finding.slug == "not_held"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.slug)
def test_the_twin_without_the_fault_has_no_alarm(case: Case) -> None:
    torch.manual_seed(0)
    assert case.healthy().go().alarms() == []
