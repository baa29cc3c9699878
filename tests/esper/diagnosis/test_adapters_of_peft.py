"""Adapters are no faults: what they freeze, start alike or put aside is meant."""

from __future__ import annotations

from functools import cache
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.diagnosis.base import Memory
from esper.diagnosis.facts import GradientRow, Gradients, TensorFacts
from esper.diagnosis.observation import Observation
from esper.diagnosis.rules.frozen_part import FrozenPart
from tests.esper.diagnosis.small_runs import digits

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 60
LAYERS = ["0", "2"]
KINDS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=LAYERS, modules_to_save=["4"]),
    "ia3": lambda: peft.IA3Config(target_modules=LAYERS, feedforward_modules=["2"]),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["2"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=LAYERS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=LAYERS),
    "norms": lambda: peft.LNTuningConfig(target_modules=["5"]),
}


@cache
def trained() -> dict[str, Tensor]:
    """Weights of a net that knows digits, as the base of an adapter does."""
    model = empty()
    train(model, "")
    return model.state_dict()


def empty() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10),
        nn.LayerNorm(10),
    )  # fmt: skip


def net() -> nn.Sequential:
    model = empty()
    model.load_state_dict(trained())
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = digits()
    numbers = torch.Generator().manual_seed(1)
    picks = [torch.randint(len(x), (32,), generator=numbers) for _ in range(STEPS)]
    return [(x[pick], y[pick]) for pick in picks]


def train(model: Any, mode: str, switched: tuple[str, ...] = (), every: int = 15) -> list[str]:
    """Trains it, and returns what was found and done."""
    adapted = [p for name, p in model.named_parameters() if p.requires_grad or "lora_" in name]
    optimizer = torch.optim.AdamW(adapted, 3e-3)
    session = None
    if mode:
        session = esper.attach(model, optimizer, mode=mode, server="", verbose=False)  # type: ignore[arg-type]
    for step, (x, y) in enumerate(batches()):
        if switched and step % every == 0:
            model.set_adapter(switched[step // every % len(switched)])
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if session is not None:
            session.step(loss)
    if session is None:
        return []
    said = [f"{f.layer}: {f.observed}" for f in session._parts.findings.all()]
    said += [receipt.remedy for receipt in session.remedies]
    session.close()
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_an_adapter_is_left_alone(kind: str) -> None:
    models = [peft.get_peft_model(net(), KINDS[kind]()) for _ in range(2)]
    train(models[0], "")
    assert train(models[1], "automatic") == []
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("every", [1, 8, 15])
def test_adapters_are_switched_in_a_run(every: int) -> None:
    models = []
    for _ in range(2):
        model = peft.get_peft_model(net(), KINDS["lora"](), adapter_name="a")
        model.add_adapter("b", peft.LoraConfig(r=2, target_modules=LAYERS))
        model.set_adapter("a")  # freezes the other one
        models.append(model)
    train(models[0], "", ("a", "b"), every)
    assert train(models[1], "automatic", ("a", "b"), every) == []
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", [["0"], ["2"], ["0", "2"]])
@pytest.mark.parametrize("first_only", [False, True])
def test_a_repaired_scale_leaves_frozen_weights(frozen: list[str], first_only: bool) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(0.01)  # type: ignore[operator]
        model[4].weight.fill_(0.1)  # type: ignore[operator]
    for name in frozen:
        model.get_submodule(name).requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = 100 * batches()[0][0]
    with esper.attach(model, optimizer, server="", verbose=False) as session:
        session.remedy("repair_scale", sample=x, first_only=first_only)
        for name, parameter in model.named_parameters():
            if name.partition(".")[0] in frozen:
                assert torch.equal(parameter, before[name]), name
        if not first_only:
            assert not torch.equal(model[4].weight, before["4.weight"])  # type: ignore[arg-type]


@pytest.mark.parametrize("was_trained", [False, True])
def test_zeros_that_were_trained_for_a_while_are_zeros_no_more(was_trained: bool) -> None:
    zeros = TensorFacts(
        name="b.weight", layer="b", kind="Linear", shape=(4, 4), trainable=False, std=0.0,
        equal_rows=1.0, all_zero=True, gain=0.0, untrained=False,
    )  # fmt: skip
    row = GradientRow("b.weight", 1.0, 0.0, 1.0, 0.01)
    read = Gradients(step=10, readings=1, rows=(row,), moved=1.0, rate=0.1, updates=1)
    observation = Observation(
        step=20, frozen=16, trainable=16, tensors=(zeros,), frozen_layers=("b",),
        gradients=(read,) if was_trained else (),
    )  # fmt: skip
    found = FrozenPart().check(observation, Memory())
    assert (found is None) == was_trained
