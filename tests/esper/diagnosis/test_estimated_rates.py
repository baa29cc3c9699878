"""Optimizers that estimate their rate: their factor is not the rate, and is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from tests.esper.diagnosis.small_runs import digits, perceptron

STEPS = 300
SLOW = ("slow_convergence", "update_ratio_low")
KINDS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "for warm-ups": {"safeguard_warmup": True, "use_bias_correction": True, "weight_decay": 0.01},
    "that stays low": {"d0": 1e-6, "growth_rate": 1.002},
}


def train(mode: str, options: dict[str, Any]) -> tuple[list[Tensor], Any]:
    torch.manual_seed(0)
    model: nn.Module = perceptron()
    x, y = digits()
    optimizer = Prodigy(model.parameters(), lr=1.0, **options)
    session = None
    if mode:
        session = esper.attach(model, optimizer, mode=mode, server="", verbose=False)  # type: ignore[arg-type]
    for _ in range(STEPS):
        pick = torch.randint(len(x), (32,))
        loss = F.cross_entropy(model(x[pick]), y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if session is not None:
            session.step(loss)
    return [p.detach().clone() for p in model.parameters()], session


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_that_grows_slowly_is_not_multiplied(kind: str) -> None:
    alone, _ = train("", KINDS[kind])
    watched, session = train("automatic", KINDS[kind])
    assert [receipt.remedy for receipt in session.remedies] == []
    assert all(map(torch.equal, alone, watched))
    found = [f.remedy for f in session.findings() if f.slug in SLOW]
    assert all("d0" in remedy for remedy in found)
    assert bool(found) == (kind == "that stays low")
    session.close()
