"""SO-35: faults from questions on Stack Overflow as DeepFD (ICSE'22) collected them.

Ported by their mechanism to data that needs no download. The truth is a label: activation, loss,
rate, optimizer, epochs, init, batch, preprocessing, layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rescue.cases import Case, Loss, Trial, accuracy
from benchmarks.rescue.faults.at8 import Data, binary, data_of, sum_of_squares

TIER = "SO-35"


@dataclass(frozen=True)
class Setting:
    """A training as a question on Stack Overflow describes it."""

    data: str = "digits"
    widths: tuple[int, ...] = (32, 32)
    activation: Callable[[], nn.Module] = nn.ReLU
    end: Callable[[], nn.Module] | None = None
    out: int = 10
    loss: Loss = F.cross_entropy
    optimizer: str = "adam"
    rate: float = 1e-3
    batch: int = 32
    scale: float = 1.0
    init: Callable[[Tensor], object] | None = None
    dropout: float = 0.0
    held: str = "all"
    zero_every: int = 1
    rows: int = 0
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    metric: Callable[[nn.Module, Tensor, Tensor], float] = accuracy
    steps: int = 300

    def trial(self, seed: int) -> Trial:
        torch.manual_seed(seed)
        x, y, held_x, held_y = diabetes() if self.data == "diabetes" else data_of(self.data, seed)
        factor = self.scale / (1 if self.data == "diabetes" else 100)
        x, held_x = x * factor, held_x * factor
        if self.rows:
            x, y = x[: self.rows], y[: self.rows]
        if self.change is not None:
            x, y = self.change(x, y)
        model = self._model(x.shape[1])
        trial = Trial(model, x, y, held_x, held_y, self._optimizer(model), self.loss, self.batch)
        trial.zero_every, trial.metric = self.zero_every, self.metric
        trial.evaluates = bool(self.rows)
        return trial

    def _model(self, inputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in self.widths:
            layers += [nn.Linear(inputs, width), self.activation()]
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
            inputs = width
        model = nn.Sequential(*layers, nn.Linear(inputs, self.out))
        if self.init is not None:
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    with torch.no_grad():
                        self.init(parameter)
        if self.end is not None:
            model.append(self.end())
        return model

    def _optimizer(self, model: nn.Sequential) -> torch.optim.Optimizer:
        linears = [module for module in model if isinstance(module, nn.Linear)]
        held = list((linears[-1] if self.held == "head" else model).parameters())
        if self.optimizer == "sgd":
            return torch.optim.SGD(held, lr=self.rate, momentum=0.9)
        if self.optimizer == "plain sgd":
            return torch.optim.SGD(held, lr=self.rate)
        return torch.optim.Adam(held, lr=self.rate)


@functools.lru_cache(maxsize=1)
def diabetes() -> Data:
    """Ten standardised features, and the course of the illness after a year, 25 to 346."""
    bunch = load_diabetes()
    x = torch.tensor(bunch.data * math.sqrt(len(bunch.data)), dtype=torch.float32)
    y = torch.tensor(bunch.target, dtype=torch.float32).unsqueeze(1)
    return x[:350], y[:350], x[350:], y[350:]


def standardised(out: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(out, (target - 152.0) / 77.0)


def explained(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """R² of targets that the model learns standardised."""
    wanted = (y - 152.0) / 77.0
    return float(1 - F.mse_loss(model(x), wanted) / wanted.var(correction=0))


def explained_as_is(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(1 - F.mse_loss(model(x), y) / y.var(correction=0))


@torch.no_grad()
def sign_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(((model(x).squeeze(1) > 0).long() == y).float().mean())


@torch.no_grad()
def half_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(((model(x).squeeze(1) > 0.5).long() == y).float().mean())


def one_logit(out: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(out, target.float().unsqueeze(1))


def one_probability(out: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy(out, target.float().unsqueeze(1))


def one_class(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.zeros_like(target))


def hot_squares(out: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(out, F.one_hot(target, out.shape[1]).float())


def wrong_sign(out: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(out, target)


def with_nan(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone()
    x[::50, 3] = math.nan
    return x, y


def with_offset(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x + 100.0, y


def shuffled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y[torch.randperm(len(y))]


DIGITS = Setting()
CIRCLES = Setting(
    data="circles", widths=(16, 16), out=1, loss=one_logit, rate=1e-2, metric=sign_accuracy
)
DIABETES = Setting(
    data="diabetes", out=1, loss=standardised, metric=explained, rate=1e-2, widths=(16,)
)
LEARNED = {"digits": 0.8, "circles": 0.75, "diabetes": 0.2}

# question -> (training, its truth, its twin)
Fault = tuple[Setting, str, Setting]
SO_35: dict[str, Fault] = {
    "Adam at a rate of 0.3": (replace(DIGITS, rate=0.3), "rate", DIGITS),
    "SGD at a rate of 2": (replace(DIGITS, optimizer="sgd", rate=2.0), "rate", DIGITS),
    "Adam at a rate of 1e-7": (replace(DIGITS, rate=1e-7), "rate", DIGITS),
    "SGD at a rate of 1e-5": (
        replace(DIGITS, optimizer="plain sgd", rate=1e-5), "rate optimizer", DIGITS
    ),
    "SGD at a rate of 100": (replace(DIGITS, optimizer="sgd", rate=100.0), "rate", DIGITS),
    "softmax before cross-entropy": (
        replace(DIGITS, end=lambda: nn.Softmax(1)), "activation", DIGITS
    ),
    "ReLU at the output": (replace(DIGITS, end=nn.ReLU), "activation", DIGITS),
    "sigmoid at the output": (replace(DIGITS, end=nn.Sigmoid), "activation", DIGITS),
    "tanh at the output": (replace(DIGITS, end=nn.Tanh), "activation", DIGITS),
    "squared error of class numbers": (
        replace(DIGITS, out=1, loss=sum_of_squares), "loss", DIGITS
    ),
    "likelihood of logits": (replace(DIGITS, loss=F.nll_loss), "loss", DIGITS),
    "binary loss with ten classes": (replace(DIGITS, out=1, loss=binary), "loss", DIGITS),
    "loss with the wrong sign": (replace(DIGITS, loss=wrong_sign), "loss", DIGITS),
    "squared error behind softmax": (
        replace(DIGITS, loss=hot_squares, end=lambda: nn.Softmax(1), optimizer="plain sgd",
                rate=1e-2), "loss activation", DIGITS,
    ),
    "pixels not scaled": (
        replace(DIGITS, scale=255.0, activation=nn.Tanh), "preprocessing", DIGITS
    ),
    "features in thousands": (replace(DIGITS, scale=1000.0), "preprocessing", DIGITS),
    "missing values": (replace(DIGITS, change=with_nan), "preprocessing", DIGITS),
    "inputs far from zero": (replace(DIGITS, change=with_offset), "preprocessing", DIGITS),
    "weights of zero": (replace(DIGITS, init=nn.init.zeros_), "init", DIGITS),
    "constant weights": (
        replace(DIGITS, init=lambda p: nn.init.constant_(p, 0.1)), "init", DIGITS
    ),
    "weights of N(0, 10)": (
        replace(DIGITS, init=lambda p: nn.init.normal_(p, 0, 10.0)), "init", DIGITS
    ),
    "weights of N(0, 1e-4)": (
        replace(DIGITS, init=lambda p: nn.init.normal_(p, 0, 1e-4)), "init", DIGITS
    ),
    "weights of N(0, 1), tanh": (
        replace(DIGITS, activation=nn.Tanh, init=lambda p: nn.init.normal_(p, 0, 1.0)), "init",
        DIGITS,
    ),
    "optimizer of the head alone": (
        replace(DIGITS, held="head", widths=(8, 8)), "optimizer", DIGITS
    ),
    "zero_grad is missing": (replace(DIGITS, zero_every=10**9), "optimizer", DIGITS),
    "batches of one": (
        replace(DIGITS, batch=1, optimizer="sgd", rate=0.1), "batch rate", DIGITS
    ),
    "ten layers of sigmoids": (
        replace(DIGITS, widths=(32,) * 10, activation=nn.Sigmoid), "activation layers", DIGITS
    ),
    "thirty layers": (
        replace(DIGITS, widths=(16,) * 30), "layers activation init", DIGITS
    ),
    "no activation": (
        replace(CIRCLES, activation=nn.Identity), "activation layers", CIRCLES
    ),
    "one unit in the middle": (replace(DIGITS, widths=(32, 1, 32)), "layers", DIGITS),
    "labels in the wrong order": (replace(DIGITS, change=shuffled), "preprocessing", DIGITS),
    "softmax of one output": (
        replace(CIRCLES, end=lambda: nn.Softmax(1), loss=one_probability, metric=half_accuracy),
        "activation", CIRCLES,
    ),
    "sigmoid before a loss of logits": (
        replace(CIRCLES, end=nn.Sigmoid, metric=half_accuracy), "activation", CIRCLES
    ),
    "cross-entropy of one class": (
        replace(CIRCLES, loss=one_class), "loss", CIRCLES
    ),
    "sigmoid for a regression": (
        replace(DIABETES, end=nn.Sigmoid, loss=F.mse_loss, metric=explained_as_is), "activation",
        DIABETES,
    ),
}  # fmt: skip

# Faults of the script that no remedy in the run can mend.
BUGS = {"activation", "loss", "preprocessing", "optimizer"}


def cases(seed: int) -> Iterator[Case]:
    """Each question once."""
    for kind, (faulty, labels, healthy) in SO_35.items():
        truth = frozenset(labels.split())
        yield Case(
            TIER, kind, faulty.data, seed, healthy.steps,
            functools.partial(faulty.trial, seed), functools.partial(healthy.trial, seed),
            labels=truth, bug=bool(truth & BUGS), by_definition=True,
            learned=LEARNED[healthy.data],
        )  # fmt: skip
