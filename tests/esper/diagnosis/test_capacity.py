"""Which hidden layers are bottlenecks, and when a loss that is flat says so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.contracts import LayerInfo
from esper.diagnosis import Observation
from esper.diagnosis.base import Evidence, Memory
from esper.diagnosis.observation import Unknown
from esper.diagnosis.rules.capacity import WINDOW, Capacity, bottleneck


def perceptron(units: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 10))


def convolutions(first: int, second: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, first, 3, padding=1), nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.Conv2d(second, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    """Two pre-norm blocks on rows of pixels."""

    def __init__(self, hidden: int, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm": nn.LayerNorm(width),
                    "up": nn.Linear(width, hidden),
                    "down": nn.Linear(hidden, width),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(-1, 8, 8))
        for block in self.blocks:
            parts = block["qkv"](x)  # type: ignore[index]
            q, k, v = parts.chunk(3, -1)
            x = x + block["out"](F.scaled_dot_product_attention(q, k, v))  # type: ignore[index]
            x = x + block["down"](F.gelu(block["up"](block["norm"](x))))  # type: ignore[index]
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class ResidualBottleneck(nn.Module):
    """The block of a deep residual net: it is narrow on purpose, and the stream goes past it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.parts = nn.Sequential(
            nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 1),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(-1, 1, 8, 8))
        return self.head((x + self.parts(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]


class LowRank(nn.Module):
    """As adapters of low rank are made: no activation lies between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 64)
        self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.wide(x) + self.up(self.down(x))))  # type: ignore[no-any-return]


def seen(model: nn.Module) -> tuple[LayerInfo, ...]:
    """The layers as one step of training shows them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with esper.attach(model, optimizer, server="", verbose=False) as session:
        torch.autograd.backward(model(torch.rand(4, 64)).square().mean())
        optimizer.step()
        session.step(1.0)
        return session.layers


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: perceptron(3), ("0", "2", 0.6)),
        (lambda: perceptron(16), None),
        (lambda: convolutions(16, 2), ("3", "5", 0.25)),
        (lambda: convolutions(2, 16), ("1", "3", 2 / 4.5)),
        (lambda: convolutions(8, 16), None),
        (lambda: Transformer(hidden=4), ("blocks.0.up", "blocks.0.down", 0.25)),
        (lambda: Transformer(hidden=64), None),
        (ResidualBottleneck, None),
        (LowRank, None),
        (lambda: nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 64)), None),
    ],
    ids=[
        *("perceptron, narrow", "perceptron", "convolutions, narrow", "convolutions, narrow first"),
        *("convolutions", "transformer, narrow", "transformer", "residual", "low rank", "code"),
    ],
)
def test_a_strict_bottleneck_is_found_and_nothing_else(
    make: Callable[[], nn.Module], place: tuple[str, str, float] | None
) -> None:
    torch.manual_seed(0)
    found = bottleneck(Observation(infos=seen(make())))
    if place is None:
        assert found is None
    else:
        assert found is not None
        assert (found[0].name, found[1].name) == place[:2]
        assert found[2] == pytest.approx(place[2])


def test_the_narrow_part_of_a_model_that_is_mostly_frozen_is_an_adapter() -> None:
    infos = seen(perceptron(3))
    assert bottleneck(Observation(infos=infos, frozen=10, trainable=9)) is None
    with pytest.raises(Unknown):
        bottleneck(Observation())


def judged(
    units: int,
    fall: float,
    *,
    held_out: float | None = None,
    steps: int = 3_500,
    noise: float = 0.1,
    once: float = 1.0,
) -> Evidence | None:
    """The loss falls from 1 by ``fall`` in the last thousand steps, after it began at 2.3.

    Args:
        once: the loss of some hundred steps long before.
    """
    draws = np.random.default_rng(0)
    at = np.arange(1, steps + 1)
    level = 1 - fall * np.clip((at - steps + WINDOW) / WINDOW, 0, 1)
    level[200:700] = once
    level[:20] = 2.3
    known = [(int(step), held_out) for step in at[::100]] if held_out is not None else []
    return Capacity().check(
        Observation(
            step=steps,
            infos=seen(perceptron(units)),
            loss_steps=at,
            losses=level + noise * draws.standard_normal(steps),
            held_out=known,
            rates=[(1, 0.01), (steps, 0.01)],
        ),
        Memory(),
    )


def test_a_flat_loss_says_so_and_the_training_loss_alone_must_say_more() -> None:
    assert judged(4, 0.2, held_out=1.0) is not None
    assert judged(4, 0.4, held_out=1.0) is None  # it falls
    assert judged(4, 0.0, held_out=2.0) is None  # that is over-fitting
    found = judged(2, 0.05)
    assert found is not None
    assert "no held-out loss is measured" in found.observed
    assert judged(2, 0.2) is None
    assert judged(4, 0.05) is None  # not narrow enough for so little evidence
    with pytest.raises(Unknown):
        judged(2, 0.05, steps=2_500)


def test_a_run_that_was_better_before_is_ill_and_lacks_no_capacity() -> None:
    for once in (0.9, 1.0, 2.0):
        found = judged(4, 0.2, held_out=1.0, once=once)
        assert found is not None
        assert "fell by" in found.observed
    with pytest.raises(Unknown, match="lower before"):
        judged(4, 0.2, held_out=1.0, once=0.6)
    with pytest.raises(Unknown, match="lower before"):
        judged(4, -0.2, held_out=1.0)


def test_a_loss_that_is_within_its_noise_is_not_stuck() -> None:
    assert judged(2, 0.0, noise=0.8) is None
