"""Scripts whose torch is set up in an unusual way are measured like others: no part fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper

STEPS = 60


def script() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, session: Any, steps: int = STEPS
) -> None:
    for _ in range(steps):
        loss = model(torch.randn(16, 8, device="cpu")).pow(2).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)


def logged_in_inference_mode() -> Any:
    model, optimizer = script()
    session = esper.attach(model, optimizer, run="kinds", verbose=False)
    for _ in range(STEPS):
        with torch.inference_mode():
            session.step(model(torch.randn(16, 8)).pow(2).mean())
    train(model, optimizer, session)
    return session


def another_default_device() -> Any:
    model, optimizer = script()
    with torch.device("meta"):
        session = esper.attach(model, optimizer, run="kinds", mode="supervised", verbose=False)
        train(model, optimizer, session)
        assert session.graft("2", "proj_lora_64").certificate.max_abs_diff == 0
        train(model, optimizer, session)
        session.state_dict()
    return session


def layers_replaced_while_it_trains() -> Any:
    model, optimizer = script()
    session = esper.attach(model, optimizer, run="kinds", verbose=False)
    train(model, optimizer, session, 25)
    model[2] = nn.Linear(16, 4)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, optimizer, session)
    del model[1]
    train(model, optimizer, session)
    return session


@pytest.mark.parametrize(
    "kind", [logged_in_inference_mode, another_default_device, layers_replaced_while_it_trains]
)
def test_every_part_goes_on(kind: Callable[[], Any]) -> None:
    session = kind()

    assert session._parts.failures.counts == {}
    assert session.frame() is not None
    assert not math.isnan(session.frame().metrics["loss"])


class LowRankAdapter(nn.Module):
    """As those of PEFT: the one factor is random, the other zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + self.up(self.down(x))
        return found


@pytest.mark.parametrize("mode", ["observe", "automatic"])
def test_adapters_that_begin_at_zero_are_no_alarm(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        LowRankAdapter(nn.Linear(8, 16)), nn.ReLU(), LowRankAdapter(nn.Linear(16, 4))
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    session = esper.attach(model, optimizer, run="adapters", mode=mode, verbose=False)
    train(model, optimizer, session, 30)

    found = [*session.findings(), *session.findings(resolved=True)]
    assert "update_ratio_high" not in {finding.slug for finding in found}
    assert session.remedies == ()
