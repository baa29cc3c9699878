"""Data sets that come with packages, and the small models that learn them.

Shape legend: N rows, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.verdict_cases import text

ADDED = 32  # units that a larger model has more; what Esper adds by default
WINDOW, WINDOWS = 8, 20_000  # characters before the one to predict; windows of the text
GRID = (1e-3, 3e-3, 1e-2)  # learning rates among which every net's rate was chosen
Data = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Host:
    """A data set with a model that learns it.

    Attributes:
        make: hidden units that the model has more -> a new model.
        shares: of the rows to train on, and to evaluate on; the others are for the report only.
        rate, large_rate: of :data:`GRID`, those with the lowest held-out loss on seeds 0 to 2.
        narrow: the model is too small on purpose.
    """

    name: str
    data: Callable[[], Data]
    loss: Loss
    make: Callable[[int], nn.Module]
    rate: float
    large_rate: float
    narrow: bool = True
    batch: int = 32
    shares: tuple[float, float] = (0.5, 0.2)


@dataclass(frozen=True)
class Rows:
    """The rows of one seed, in three parts that share none.

    Attributes:
        train: what the model learns from.
        judge: what Esper may evaluate on.
        report: what is reported.
        drawn: int64 [steps, batch], the rows of each step's batch.
    """

    train: Data
    judge: Data
    report: Data
    drawn: Tensor


def rows_of(host: Host, seed: int, steps: int) -> Rows:
    x, y = host.data()
    dice = np.random.default_rng(seed)
    order = torch.from_numpy(dice.permutation(len(x)))
    first, second = (round(share * len(x)) for share in np.cumsum(host.shares))
    train, judge, report = ((x[rows], y[rows]) for rows in order.tensor_split((first, second)))
    drawn = torch.from_numpy(dice.integers(0, first, (steps, host.batch)))
    return Rows(train, judge, report, drawn)


@cache
def digits() -> Data:
    found = load_digits()
    return torch.tensor(found.data / 16.0, dtype=torch.float32), torch.tensor(found.target)


@cache
def lower_rows() -> Data:
    """The upper five rows of a digit, and its lower three to be predicted."""
    pixels, _ = digits()
    return pixels[:, :40], pixels[:, 40:]


@cache
def windows() -> Data:
    """Some characters of the text of Python's help, and the next one."""
    codes = text()
    starts = np.random.default_rng(0).integers(0, len(codes) - WINDOW - 1, WINDOWS)
    index = torch.from_numpy(starts)[:, None] + torch.arange(WINDOW + 1)
    found = codes[index]
    return found[:, :WINDOW], found[:, WINDOW]


@cache
def table(name: str) -> Data:
    """One of scikit-learn's tables, each column with mean 0 and deviation 1."""
    loaders = {"wine": load_wine, "breast cancer": load_breast_cancer, "diabetes": load_diabetes}
    found = loaders[name]()
    x_NI = torch.tensor(found.data, dtype=torch.float32)
    x_NI = (x_NI - x_NI.mean(0)) / x_NI.std(0)
    if name != "diabetes":
        return x_NI, torch.tensor(found.target)
    target = torch.tensor(found.target, dtype=torch.float32)[:, None]
    return x_NI, (target - target.mean()) / target.std()


def perceptron(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        parts += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*parts[:-1])


def _characters(extra: int, act: type[nn.Module]) -> nn.Module:
    vocabulary = int(text().max()) + 1
    net = perceptron(8 * WINDOW, 32, 4 + extra, vocabulary, act=act)
    return nn.Sequential(nn.Embedding(vocabulary, 8), nn.Flatten(), *net)


NARROW = (
    Host(
        "digits", digits, F.cross_entropy, lambda extra: perceptron(64, 3 + extra, 10),
        rate=3e-3, large_rate=1e-2,
    ),
    Host(
        "lower rows", lower_rows, F.mse_loss, lambda extra: perceptron(40, 32, 3 + extra, 24),
        rate=3e-3, large_rate=3e-3,
    ),
    Host(
        "text", windows, F.cross_entropy, lambda extra: _characters(extra, nn.ReLU),
        rate=3e-3, large_rate=3e-3,
    ),
    Host(
        "text, tanh", windows, F.cross_entropy, lambda extra: _characters(extra, nn.Tanh),
        rate=3e-3, large_rate=3e-3,
    ),
)  # fmt: skip
WIDE = (
    Host(
        "wine", lambda: table("wine"), F.cross_entropy,
        lambda extra: perceptron(13, 16 + extra, 3), rate=1e-3, large_rate=1e-3, narrow=False,
    ),
    Host(
        "breast cancer", lambda: table("breast cancer"), F.cross_entropy,
        lambda extra: perceptron(30, 16 + extra, 2), rate=1e-3, large_rate=1e-3, narrow=False,
    ),
    Host(
        "diabetes", lambda: table("diabetes"), F.mse_loss,
        lambda extra: perceptron(10, 16 + extra, 1), rate=1e-3, large_rate=1e-3, narrow=False,
    ),
)  # fmt: skip
