"""A layer's activations are read where the network uses them: behind the activation function."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.contracts import HealthFrame, Signal
from esper.grafting.slot import living_grafts


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Functional(nn.Module):
    """Two maps with a function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.between(self.first(x)))
        return y


class Residual(nn.Module):
    """x + f(x), then ReLU, as in a ResNet; or a sum that nothing rectifies."""

    def __init__(self, *, rectified: bool) -> None:
        super().__init__()
        self.stem, self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = h + self.first(h)
        y: Tensor = self.head(F.relu(h) if self.rectified else h)
        return y


class Convolutions(nn.Module):
    """Conv - BatchNorm - ReLU - Conv - ReLU - pooling - flatten - Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.head = nn.Conv2d(6, 4, 3, padding=1), nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.a(x.reshape(-1, 1, 8, 8))))
        h = F.max_pool2d(F.relu(self.b(h)), 2)
        y: Tensor = self.head(h.flatten(1))
        return y


def bias_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer.bias, Tensor)
    return layer.bias


def kill(layer: nn.Module, units: int) -> None:
    with torch.no_grad():
        bias_of(layer)[:units] = -1e4


def deep_frame(model: nn.Module, width: int = 8) -> HealthFrame:
    """A frame with activations, of a run in which nothing moves."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(32, width)
    with esper.attach(model, optimizer, sampling=((0, 2, 2),)) as session:
        for _ in range(4):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)
        frame = session.frame()
    assert frame is not None
    return frame


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "in place": lambda h: F.relu(h, inplace=True),
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "clamp": lambda h: h.clamp(min=0),
    "maximum": lambda h: torch.maximum(h, torch.zeros(())),
    "relu6": F.relu6,
    "relu, then dropout": lambda h: F.dropout(F.relu(h), 0.3),
    "relu, then a gain": lambda h: F.relu(h) * nn.Parameter(torch.ones(16)),
    "reshaped": lambda h: F.relu(h.view(4, 8, 16)).reshape(32, 16),
    "by hand": lambda h: h * (h > 0),
    "squared": lambda h: F.relu(h).square(),
    "another dtype on the way": lambda h: F.relu(h.double()).float(),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_dead_units_are_seen_behind_every_kind_of_rectifier(between: str) -> None:
    model = Functional(BETWEEN[between])
    kill(model.first, 12)
    frame = deep_frame(model)

    assert frame.value("first", Signal.DEAD_FRACTION) == pytest.approx(12 / 16)
    assert frame.value("first", Signal.INACTIVE_FRACTION) == pytest.approx(12 / 16)
    assert frame.value("first", Signal.HEALTH) < 0.8


def test_a_layer_that_is_all_dead_is_unhealthy_and_its_gradient_is_a_known_zero() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    model.append(nn.Linear(16, 4))
    kill(model[2], 16)
    frame = deep_frame(model)

    assert frame.value("2", Signal.DEAD_FRACTION) == 1.0
    assert frame.value("2", Signal.GRAD_NORM) == 0.0
    assert frame.value("2", Signal.GRAD_ZERO_SHARE) == 1.0
    assert frame.value("2", Signal.SATURATION) == 0.0
    assert frame.value("2", Signal.HEALTH) < 0.5
    assert frame.value("4", Signal.GRAD_NORM) > 0.0


def test_gelu_and_tanh_are_read_behind_the_function() -> None:
    gelu, tanh = Functional(F.gelu), Functional(torch.tanh)
    with torch.no_grad():
        bias_of(gelu.first).fill_(-30.0)
        bias_of(tanh.first).fill_(30.0)

    assert deep_frame(gelu).value("first", Signal.ACT_ABS_MAX) < 1e-3
    assert deep_frame(tanh).value("first", Signal.ACT_ABS_MAX) == pytest.approx(1.0)
    assert deep_frame(tanh).value("first", Signal.SATURATION) == 1.0


def test_a_convolution_is_read_where_it_enters_the_norm_and_the_norm_behind_the_relu() -> None:
    model = Convolutions()
    kill(model.norm, 3)
    kill(model.b, 2)
    frame = deep_frame(model, 64)

    assert frame.value("a", Signal.DEAD_FRACTION) == 0.0
    assert frame.value("norm", Signal.DEAD_FRACTION) == pytest.approx(3 / 6)
    # Flattened behind the pooling, a unit is still a channel.
    assert frame.value("b", Signal.DEAD_FRACTION) == pytest.approx(2 / 4)


def test_a_rectified_sum_counts_for_the_layer_that_was_added_last() -> None:
    rectified, plain = Residual(rectified=True), Residual(rectified=False)
    for model in (rectified, plain):
        kill(model.first, 4)

    assert deep_frame(rectified).value("first", Signal.INACTIVE_FRACTION) == pytest.approx(4 / 16)
    # Nothing rectifies the sum: the layer's own output is read, where these units are far from 0.
    assert deep_frame(plain).value("first", Signal.INACTIVE_FRACTION) == 0.0
    assert deep_frame(plain).value("first", Signal.ACT_ABS_MAX) > 9_000


class TwoWays(nn.Module):
    """A gated unit: what enters the last layer is made of two layers' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def test_an_input_made_of_two_layers_counts_for_neither() -> None:
    model = TwoWays()
    frame = deep_frame(model)
    x = torch.randn(4096, 8)

    for name, layer in (("gate", model.gate), ("up", model.up)):
        expected = layer(x).std().item()
        assert frame.value(name, Signal.ACT_STD) == pytest.approx(expected, rel=0.25)


def test_matrices_of_no_layer_end_the_way() -> None:
    weight = torch.zeros(16, 16)
    for trained in (False, True):
        held = nn.Parameter(weight) if trained else weight
        frame = deep_frame(Functional(lambda h, held=held: F.relu(h @ held)))

        assert frame.value("first", Signal.DEAD_FRACTION) == 0.0


def test_a_layer_that_enters_no_other_is_read_at_its_own_output() -> None:
    frame = deep_frame(Functional(F.relu))

    assert frame.value("second", Signal.ACT_STD) > 0.0
    assert frame.value("second", Signal.ACT_MEAN) != 0.0


def test_a_grafted_layer_is_read_behind_its_graft_and_its_activation() -> None:
    model = Functional(F.relu)
    kill(model.first, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(32, 8)
    with esper.attach(model, optimizer, mode="supervised", sampling=((0, 2, 2),)) as session:
        for step in range(12):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)
            if step == 3:
                session.graft("first", "proj_lora_64")
        frame = session.frame()
        assert frame is not None
        grafted = frame.value("first", Signal.INACTIVE_FRACTION)

    assert len(living_grafts(model)) == 1
    assert grafted == pytest.approx(8 / 16)


def test_a_frozen_layer_is_read_too() -> None:
    model = Functional(F.relu)
    model.first.requires_grad_(False)
    frame = deep_frame(model)

    assert math.isfinite(frame.value("first", Signal.ACT_STD))


def test_nothing_of_the_users_graph_is_held_after_a_frame() -> None:
    model = Functional(F.relu)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with esper.attach(model, optimizer, sampling=((0, 2, 2),)) as session:
        for _ in range(4):
            loss = model(torch.randn(32, 8)).square().mean()
            optimizer.step()
            session.step(loss)
        sampler = session._parts.surgery.sampler
        assert sampler is not None
        assert not sampler._activations._outputs
