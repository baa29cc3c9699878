"""The whole way from a real training loop to a decision, on nets that train in a second."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from esper.contracts import (
    AdaptationType,
    Decision,
    Declined,
    LayerInfo,
    RunMode,
    RunSnapshot,
    SafetyPolicy,
)
from esper.health import HealthSampler
from esper.health.pace import SamplingPace
from esper.pipeline import decide
from esper.policy import HeuristicPolicy
from tests.esper.conftest import LACKS_CAPACITY
from tests.esper.health.forward_hooks import forward_hook_watch


def run_of(width: int, steps: int, *, teacher_rank: int = 8) -> RunSnapshot:
    """Trains a student of ``width`` on a teacher that needs ``teacher_rank`` units."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, teacher_rank), nn.Tanh(), nn.Linear(teacher_rank, 8))
    model = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 8))
    layers = tuple(
        LayerInfo(
            name,
            "Linear",
            (64, module.in_features),
            (64, module.out_features),
            "float32",
            sum(p.numel() for p in module.parameters()),
            True,
            features_in=module.in_features,
            features_out=module.out_features,
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    watch, pace = forward_hook_watch(model), SamplingPace(budget=0)
    sampler = HealthSampler(model, [optimizer], layers, watch=watch, pace=pace)
    losses, frames = [], []
    for step in range(1, steps + 1):
        x = torch.randn(64, 16)
        with torch.no_grad():
            target = teacher(x)
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        frame = sampler.step(step, loss)
        if frame is not None:
            frames.append(frame)
    return RunSnapshot(
        run="tiny",
        epoch=1,
        mode=RunMode.AUTOMATIC,
        step=steps,
        layers=layers,
        frames=tuple(frames),
        loss_steps=np.arange(1, steps + 1),
        loss=np.array(losses),
        model_parameters=sum(p.numel() for p in model.parameters()),
    )


def answer(snapshot: RunSnapshot, catalog: Any) -> Decision | Declined:
    return decide(snapshot, HeuristicPolicy(), catalog, SafetyPolicy(), np.random.default_rng(0))


def test_a_net_that_is_too_small_gets_a_cheap_proposal_once_the_diagnosis_says_so(
    catalog: Any,
) -> None:
    run = run_of(width=2, steps=700)
    assert isinstance(answer(run, catalog), Declined)

    found = answer(replace(run, findings=(LACKS_CAPACITY,)), catalog)

    assert isinstance(found, Decision)
    assert found.adaptation.adaptation_type is AdaptationType.ADD_EFFICIENCY
    assert not found.automatic  # half of such grafts help, so a person decides


def test_a_net_that_is_large_enough_and_learns_gets_none(catalog: Any) -> None:
    snapshot = run_of(width=64, steps=700)

    assert isinstance(answer(snapshot, catalog), Declined)


def test_deciding_needs_no_torch() -> None:
    code = (
        "import sys, esper.pipeline, esper.replay, esper.reward, esper.constraints\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
