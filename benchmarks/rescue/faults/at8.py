"""AT-8: eight training problems from a seeded grid, after AutoTrainer (ICSE'21, TDSC'24).

Circles and blobs times 100, where nets are 5 wide and 6 to 18 deep; digits, with a perceptron and
with a convolutional net; and the next byte of a text. Healthy runs divide the inputs by 100.
"""

from __future__ import annotations

import functools
import math
import pydoc_data.topics
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_digits, make_blobs, make_circles
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rescue.cases import Case, Loss, Trial

TIER = "AT-8"
LEARNED = {"circles": 0.7, "blobs": 0.7, "digits": 0.7, "images": 0.7, "text": 0.2}
WIDTHS = {"circles": 5, "blobs": 5, "digits": 16, "images": 16, "text": 48}
CONTEXT = 8  # bytes
CHARACTERS = 128


@dataclass(frozen=True)
class Draw:
    """A point of the grid; a fault changes it."""

    data: str
    depth: int
    activation: type[nn.Module]
    optimizer: str
    seed: int
    rate: float = 1.0
    gain: float = 1.0
    bias: float = 0.0
    scale: float = 0.01
    batch: int = 32
    end: Callable[[], nn.Module] | None = None
    loss: Loss = F.cross_entropy
    out: int = 0
    norm: bool = False
    clip: float = 0.0

    def trial(self) -> Trial:
        torch.manual_seed(self.seed)
        x, y, held_x, held_y = data_of(self.data, self.seed)
        if x.is_floating_point():
            x, held_x = x * self.scale, held_x * self.scale
        model = net(self, self.out or int(y.max()) + 1)
        if self.end is not None:
            model.append(self.end())
        optimizer = self._optimizer(model)
        return Trial(model, x, y, held_x, held_y, optimizer, self.loss, self.batch)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        if self.clip:
            for parameter in parameters:
                parameter.register_hook(lambda g: g.clamp(-self.clip, self.clip))  # type: ignore[no-untyped-call]
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.01 * self.rate, momentum=0.9)
        return torch.optim.Adam(parameters, lr=3e-3 * self.rate)


Data = tuple[Tensor, Tensor, Tensor, Tensor]


@functools.lru_cache(maxsize=256)
def data_of(name: str, seed: int) -> Data:
    """Inputs times 100 and targets, to train and held out."""
    if name == "text":
        return text(seed)
    if name in ("digits", "images"):
        bunch = load_digits()
        x, y, first = bunch.data / 16.0, bunch.target, 1300
        if name == "images":
            x = x.reshape(-1, 1, 8, 8)
    else:
        first = 700
        if name == "circles":
            x, y = make_circles(1000, noise=0.1, random_state=seed)
        else:
            x, y = make_blobs(1000, centers=3, cluster_std=2, random_state=seed)
            x = x / 10.0
    inputs, targets = torch.tensor(100 * x, dtype=torch.float32), torch.tensor(y)
    return inputs[:first], targets[:first], inputs[first:], targets[first:]


def text(seed: int) -> Data:
    """Eight bytes of Python's own documentation, and the byte that follows."""
    joined = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    codes = torch.tensor([min(ord(c), CHARACTERS - 1) for c in joined])
    windows = codes.unfold(0, CONTEXT + 1, 1)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:4500]
    x, y = windows[chosen, :CONTEXT], windows[chosen, CONTEXT]
    return x[:4000], y[:4000], x[4000:], y[4000:]


def net(draw: Draw, classes: int) -> nn.Sequential:
    width, layers = WIDTHS[draw.data], []
    inputs = {"circles": 2, "blobs": 2, "digits": 64, "images": 16, "text": 8 * CONTEXT}[draw.data]
    if draw.data == "text":
        layers += [nn.Embedding(CHARACTERS, 8), nn.Flatten()]
        classes = draw.out or CHARACTERS
    convolutions = min(3, draw.depth // 2) if draw.data == "images" else 0
    for place in range(convolutions):
        conv = nn.Conv2d(1 if place == 0 else 16, 16, 3, padding=1)
        layers += [start(conv, draw), *_norm(draw, nn.BatchNorm2d(16)), draw.activation()]
    if convolutions:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for place in range(draw.depth - convolutions):
        linear = nn.Linear(inputs if place == 0 else width, width)
        layers += [start(linear, draw), *_norm(draw, nn.BatchNorm1d(width)), draw.activation()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _norm(draw: Draw, norm: nn.Module) -> list[nn.Module]:
    return [norm] if draw.norm else []


def start(layer: nn.Linear | nn.Conv2d, draw: Draw) -> nn.Module:
    standard = math.sqrt(2.0) if draw.activation is nn.ReLU else 5.0 / 3.0
    nn.init.orthogonal_(layer.weight, standard * draw.gain)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, draw.bias)
    return layer


# --- faults ---------------------------------------------------------------------------------------


def sum_of_squares(out: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(out, target.float().unsqueeze(1))


def likelihood(out: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(out, target)


def binary(out: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(out, 2.0 * target.float().unsqueeze(1))


def vanish(draw: Draw, dice: random.Random) -> Draw:
    sigmoid = dice.random() < 0.5
    return replace(
        draw,
        activation=nn.Sigmoid if sigmoid else nn.Tanh,
        gain=0.6 if sigmoid else 0.3,
        depth=max(draw.depth, 9),
    )


def explode(draw: Draw, dice: random.Random) -> Draw:
    gain = dice.choice([3.0, 5.0, 8.0])
    return replace(draw, activation=nn.ReLU, optimizer="sgd", gain=gain)


def die(draw: Draw, dice: random.Random) -> Draw:
    if dice.random() < 0.5:
        return replace(draw, activation=nn.ReLU, bias=dice.choice([-2.0, -5.0]))
    return replace(draw, activation=nn.ReLU, rate=dice.choice([100.0, 300.0]))


def oscillate(draw: Draw, dice: random.Random) -> Draw:
    rate, batch = dice.choice([30.0, 100.0, 300.0]), dice.choice([8, 32])
    return replace(draw, activation=nn.Tanh, optimizer="sgd", rate=rate, batch=batch)


def slow_down(draw: Draw, dice: random.Random) -> Draw:
    return replace(draw, rate=dice.choice([1e-3, 3e-4]))


def squash(draw: Draw, dice: random.Random) -> Draw:
    ends: list[Callable[[], nn.Module]] = [lambda: nn.Softmax(1), nn.ReLU, nn.Sigmoid]
    return replace(draw, end=dice.choice(ends))


def wrong_loss(draw: Draw, dice: random.Random) -> Draw:
    if dice.random() < 0.5:
        return replace(draw, loss=likelihood)
    return replace(draw, loss=binary, out=1)


def unscaled(draw: Draw, dice: random.Random) -> Draw:
    return replace(draw, scale=1.0)


@dataclass(frozen=True)
class Kind:
    """One of the eight problems.

    Attributes:
        cures: AutoTrainer's, in its order, as changes of the draw.
        bug: of the script: told, not repaired.
        by_definition: it is a fault also where the run learns.
    """

    fault: Callable[[Draw, random.Random], Draw]
    rules: frozenset[str]
    cures: tuple[Callable[[Draw], Draw], ...]
    bug: bool = False
    by_definition: bool = False


def selu(draw: Draw) -> Draw:
    return replace(draw, activation=nn.SELU)


def relu(draw: Draw) -> Draw:
    return replace(draw, activation=nn.ReLU)


def leaky(draw: Draw) -> Draw:
    return replace(draw, activation=nn.LeakyReLU)


def normalised(draw: Draw) -> Draw:
    return replace(draw, norm=True)


def initialised(draw: Draw) -> Draw:
    return replace(draw, gain=1.0, bias=0.0)


def clipped(draw: Draw) -> Draw:
    return replace(draw, clip=1.0)


def to_adam(draw: Draw) -> Draw:
    return replace(draw, optimizer="adam")


def usual_rate(draw: Draw) -> Draw:
    return replace(draw, rate=1.0)


def large_batch(draw: Draw) -> Draw:
    return replace(draw, batch=64)


def without_end(draw: Draw) -> Draw:
    return replace(draw, end=None)


def fitting_loss(draw: Draw) -> Draw:
    return replace(draw, loss=F.cross_entropy, out=0)


def scaled(draw: Draw) -> Draw:
    return replace(draw, scale=0.01)


AT_8 = {
    "vanishing gradient": Kind(
        vanish,
        frozenset({"vanishing_gradient", "bad_initialisation"}),
        (selu, relu, normalised),
    ),
    "exploding gradient": Kind(
        explode,
        frozenset({"exploding_gradient", "bad_initialisation", "non_finite"}),
        (selu, clipped, normalised),
    ),
    "dying ReLU": Kind(die, frozenset({"dying_relu"}), (selu, normalised, initialised, leaky)),
    "oscillating loss": Kind(
        oscillate,
        frozenset({"oscillating_loss", "update_ratio_high", "loss_spike", "saturation"}),
        (to_adam, usual_rate, large_batch),
    ),
    "slow convergence": Kind(
        slow_down,
        frozenset({"slow_convergence", "update_ratio_low"}),
        (to_adam, usual_rate, initialised),
    ),
    "wrong output activation": Kind(
        squash, frozenset({"wrong_output_activation"}), (without_end,), bug=True, by_definition=True
    ),
    "wrong loss": Kind(
        wrong_loss, frozenset({"wrong_loss"}), (fitting_loss,), bug=True, by_definition=True
    ),
    "abnormal data": Kind(unscaled, frozenset({"abnormal_data"}), (scaled,), by_definition=True),
}


def drawn_data(kind: str, dice: random.Random) -> str:
    """The data set of a case; the first thing that its dice, :func:`dice_of`, decide."""
    # Points first: they are what AutoTrainer was measured on.
    data = dice.choice(["circles", "blobs"] * 2 + ["digits", "images", "text"])
    if kind == "abnormal data" and data == "text":
        data = "digits"  # bytes have no scale
    return data


def dice_of(kind: str, seed: int) -> random.Random:
    return random.Random(f"{kind} {seed}")


def cases(kind: str, seeds: range, steps: int) -> Iterator[Case]:
    """One draw for each seed; whether it counts is known after its twin has been trained."""
    for seed in seeds:
        dice = dice_of(kind, seed)
        data = drawn_data(kind, dice)
        healthy = Draw(
            data=data,
            depth=dice.randint(6, 18 if data in ("circles", "blobs") else 9),
            activation=dice.choice([nn.Tanh, nn.ReLU]),
            optimizer=dice.choice(["adam", "sgd"]),
            seed=seed,
        )
        found = AT_8[kind]
        faulty = found.fault(healthy, dice)
        # The twin differs by the fault alone.
        healthy = replace(
            healthy,
            activation=nn.Tanh if faulty.activation is nn.Sigmoid else faulty.activation,
            optimizer=faulty.optimizer,
            depth=faulty.depth,
        )
        cured, chain = [], faulty
        for cure in found.cures:
            chain = cure(chain)
            cured.append(chain.trial)
        yield Case(
            TIER, kind, data, seed, steps, faulty.trial, healthy.trial,
            rules=found.rules, bug=found.bug, by_definition=found.by_definition,
            learned=LEARNED[data], cures=tuple(cured),
        )  # fmt: skip
