"""In automatic mode a healthy run is left alone: nothing is grafted, and no remedy is applied.

Each of these runs ends on a loss that is flat and far above zero, because its labels are noisy or
its rate has gone to zero. That is no lack of capacity.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.esper.diagnosis.small_runs import Run, adam, cosine, digits, perceptron
from tests.esper.diagnosis.test_healthy_runs import (
    LanguageModel,
    adamw,
    convolutional,
    next_byte,
    text,
)

STEPS = 900


def noisy_digits() -> tuple[Tensor, Tensor]:
    """A third of the labels are random."""
    x, y = digits()
    wrong = torch.rand(len(y)) < 1 / 3
    return x, torch.where(wrong, torch.randint_like(y, 10), y)


def table() -> tuple[Tensor, Tensor]:
    """A linear law with as much noise as signal."""
    x = torch.randn(2000, 12)
    y = x @ torch.randn(12, 1)
    return x, y + y.std() * torch.randn_like(y)


def early(run: Run, step: int) -> None:
    """Stops to learn when half of the steps are over, as a loop with patience does."""
    if step == STEPS // 2:
        for group in run.opt.param_groups:
            group["lr"] = 0.0


KINDS: dict[str, Callable[[], Run]] = {
    "perceptron, plain": lambda: Run(perceptron(0.3), noisy_digits(), steps=STEPS),
    "convolutions, schedule": lambda: Run(
        convolutional(), noisy_digits(), schedule=cosine(20, STEPS // 2), steps=STEPS // 2
    ),
    "language model, early": lambda: Run(
        LanguageModel(),
        text(),
        loss=next_byte,
        optimizer=adamw,
        schedule=lambda step: float(step < 150),
        steps=250,
    ),
    "table, plain": lambda: Run(
        nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1)),
        table(),
        loss=F.mse_loss,
        optimizer=lambda model: adam(model, 1e-2),
        steps=STEPS,
    ),
    "table, early": lambda: Run(
        nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1)),
        table(),
        loss=F.mse_loss,
        optimizer=lambda model: adam(model, 1e-2),
        before=early,
        steps=STEPS,
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_nothing_is_grafted_into_a_healthy_run(kind: Callable[[], Run]) -> None:
    torch.manual_seed(0)
    run = kind()
    run.mode = "automatic"
    with run.start() as session:
        result = run.train(session)
        assert result.grafted == ()
        assert session.remedies == ()
        assert "is proposed" not in str(session.why())
    assert "nan" not in str(session.why())
