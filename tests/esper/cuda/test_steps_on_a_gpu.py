"""What Esper measures on a GPU is right, and no step waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper import Session
from esper.contracts import Signal
from tests.esper.cuda.device import DEVICE, IS_GPU, needs_device, needs_gpu

pytestmark = [pytest.mark.cuda, needs_device]


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def encoder() -> nn.Module:
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.Linear(4, 8), block, nn.Flatten(), nn.Linear(16, 4)
    )


def dead() -> nn.Module:
    model = perceptron()
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[index, union-attr, operator]
        model[0].bias.fill_(-9.0)  # type: ignore[index, union-attr, operator]
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron, "convolutions": convolutions, "encoder": encoder, "dead": dead,
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "adamw capturable": lambda p: torch.optim.AdamW(
        p, torch.tensor(1e-3, device=DEVICE), capturable=IS_GPU, foreach=IS_GPU
    ),
}


@contextmanager
def nothing_waits() -> Iterator[None]:
    """On a GPU, torch raises where the host would wait for the device."""
    if not IS_GPU:
        yield
        return
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Loop:
    def __init__(self, model: str = "perceptron", optimizer: str = "adamw") -> None:
        torch.manual_seed(0)
        self.model = MODELS[model]().to(DEVICE)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.x = torch.randn(32, 8, device=DEVICE)
        self.target = torch.randint(4, (32,), device=DEVICE)
        self.losses: list[Tensor] = []

    def train(self, session: Session, steps: int, *, spoil: float = 1.0) -> None:
        for _ in range(steps):
            loss = F.cross_entropy(self.model(self.x), self.target) * spoil
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            session.step(loss)
            self.losses.append(loss.detach())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_waits_for_the_gpu(model: str, optimizer: str) -> None:
    loop = Loop(model, optimizer)
    with esper.attach(loop.model, loop.optimizer, sampling=((0, 5, 15),)) as session:
        loop.train(session, 4)  # the first steps allocate, and look at the model once
        with nothing_waits():
            loop.train(session, 60)
        failed = [f.observed for f in session.findings() if "failed" in f.observed]
        frame = session.frame()

    assert failed == []
    assert frame is not None
    assert math.isfinite(frame.metrics["loss"])


@pytest.mark.parametrize("blueprint", ["proj_lora_64", "mlp_gelu_2048"])
def test_no_step_waits_while_a_graft_is_on_probation(blueprint: str) -> None:
    loop = Loop()
    with esper.attach(
        loop.model, loop.optimizer, mode="supervised", sampling=((0, 5, 15),)
    ) as session:
        loop.train(session, 5)
        session.graft("2", blueprint)
        loop.train(session, 3)
        with nothing_waits():
            loop.train(session, 45)
        failed = [f.observed for f in session.findings() if "failed" in f.observed]

    assert failed == []


@pytest.mark.parametrize("model", MODELS)
def test_a_frame_holds_the_numbers_of_its_step(model: str) -> None:
    loop = Loop(model, "sgd")
    norms: dict[int, list[float]] = {}
    frames = {}
    with esper.attach(loop.model, loop.optimizer, sampling=((0, 5, 5),)) as session:
        for step in range(1, 24):
            loop.train(session, 1)
            norms[step] = [float(p.detach().norm()) for p in loop.model.parameters()]
            frame = session.frame()
            if frame is not None:
                frames[frame.step] = frame
    names = [name.rpartition(".")[0] for name, _ in loop.model.named_parameters()]

    assert [*frames] == [5, 10, 15, 20]
    for step, frame in frames.items():
        assert frame.metrics["loss"] == pytest.approx(float(loop.losses[step - 1]), rel=1e-5)
        for layer in frame.layers:
            # An attention's projections belong to it.
            inside = [name == layer or name.startswith(f"{layer}.") for name in names]
            squares = [n**2 for n, own in zip(norms[step], inside, strict=True) if own]
            if squares:
                expected = math.sqrt(sum(squares))
                assert frame.value(layer, Signal.WEIGHT_NORM) == pytest.approx(expected, rel=1e-3)


def test_losses_are_equal_to_the_bit() -> None:
    plain, watched = Loop(), Loop()
    for _ in range(30):
        loss = F.cross_entropy(plain.model(plain.x), plain.target)
        plain.optimizer.zero_grad()
        torch.autograd.backward(loss)
        plain.optimizer.step()
        plain.losses.append(loss.detach())
    with esper.attach(watched.model, watched.optimizer, sampling=((0, 5, 15),)) as session:
        watched.train(session, 30)

    assert torch.equal(torch.stack(plain.losses), torch.stack(watched.losses))


def test_the_guard_takes_a_graft_out_within_two_steps() -> None:
    loop = Loop()
    with esper.attach(loop.model, loop.optimizer, mode="supervised") as session:
        loop.train(session, 30)
        session.graft("2", "proj_lora_64")
        loop.train(session, 5)
        loop.train(session, 1, spoil=math.nan)
        loop.train(session, 1)

        assert not session.adaptations[0].on_probation


@needs_gpu
def test_numbers_arrive_a_step_later() -> None:
    loop = Loop()
    with esper.attach(loop.model, loop.optimizer, sampling=((0, 5, 15),)) as session:
        loop.train(session, 5)
        assert session.frame() is None
        loop.train(session, 1)
        frame = session.frame()

    assert frame is not None
    assert frame.step == 5
