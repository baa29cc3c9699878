"""A schedule that ends long before the run is told and answered; one that ends with it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

import esper
from tests.esper.diagnosis.small_runs import digits

SLUG = "rate_vanished"
STEPS = 400


def train(schedule: Callable[[Any], Any], rate: float, steps: int = STEPS) -> tuple[Any, float]:
    """The session after a run on digits, and the run's last loss."""
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    scheduler = schedule(optimizer)
    losses = []
    with esper.attach(model, optimizer, mode="automatic", server="", verbose=False) as session:
        for _ in range(steps):
            rows = torch.randint(0, len(x), (64,))
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            session.step(loss)
            losses.append(loss.item())
    return session, sum(losses[-20:]) / 20


TOO_SHORT = {
    "an epoch's factor each step": lambda o: schedules.ExponentialLR(o, 0.8),
    "an epoch's stages each step": lambda o: schedules.StepLR(o, 2, 0.1),
    "zero after the steps that it was given": lambda o: schedules.LinearLR(o, 1.0, 0.0, 10),
    "a warm-up, and then zero": lambda o: schedules.LambdaLR(
        o, lambda step: max(0.0, min(step / 4, (10 - step) / 6))
    ),
}
LONG_ENOUGH = {
    "a cosine that ends with the run": lambda o: schedules.CosineAnnealingLR(o, STEPS),
    "a line that ends with the run": lambda o: schedules.LinearLR(o, 1.0, 0.0, STEPS),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=STEPS),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 100),
}


@pytest.mark.parametrize("schedule", TOO_SHORT.values(), ids=TOO_SHORT)
def test_the_rate_of_before_is_held_where_a_schedule_ends_before_anything_was_learned(
    schedule: Callable[[Any], Any],
) -> None:
    session, loss = train(schedule, 0.01)
    assert [receipt.remedy for receipt in session.remedies] == ["hold_lr"]
    assert loss < 0.8
    assert SLUG not in {finding.slug for finding in session.findings()}


@pytest.mark.parametrize("schedule", LONG_ENOUGH.values(), ids=LONG_ENOUGH)
def test_a_schedule_that_ends_with_the_run_is_left_alone(schedule: Callable[[Any], Any]) -> None:
    session, _ = train(schedule, 0.05)
    assert session.remedies == ()
    assert SLUG not in {finding.slug for finding in session.findings()}


def test_a_run_that_has_learned_before_is_only_told() -> None:
    session, _ = train(lambda o: schedules.ExponentialLR(o, 0.95), 0.1, steps=600)
    assert session.remedies == ()
    assert [f.severity for f in session.findings() if f.slug == SLUG] == ["info"]
