"""Ordinary runs, drawn at random: what does automatic mode do to those that need nothing?

    python -m benchmarks.ordinary [--quick] [--seeds 3400:3600] [--json FILE] [--docs FOLDER]

Each seed draws a small data set, a perceptron (of digits also convolutions, a recurrent net or
attention), an activation, a normalisation, dropout, a batch size, an optimizer, a schedule, and a
learning rate within two decades around the usual one of that optimizer. Most of these runs are
sound, some are not. Each runs twice from the same seed: left alone, and with
``esper.attach(mode="automatic")`` without a server. A run is *touched* where a remedy was applied
or a loss differs in any bit; *worse* or *better* where its held-out score (accuracy, or the
explained share of the variance) is more than 0.02 lower or higher.

What Esper does was changed on seeds below 3400; the report is made on others.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

import esper
from benchmarks.installation import machine

STEPS = 400
MARGIN = 0.02
PAGE = "ordinary.md"
BEGIN, END = "<!-- ordinary: measured -->", "<!-- ordinary: end -->"
Optimizer = torch.optim.Optimizer

DATA: dict[str, Callable[[], Any]] = {
    "digits": datasets.load_digits,
    "cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
}
ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.ELU, nn.Sigmoid)
WIDTHS = (2, 4, 8, 16, 32, 64, 128, 256)
LOSSES = (F.mse_loss, F.l1_loss, F.huber_loss)
# Name -> (the optimizer, log10 of the lowest and of the highest rate).
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float, float]] = {
    "SGD": (torch.optim.SGD, -2.5, -0.5),
    "SGD, momentum": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), -3.0, -1.0),
    "SGD, Nesterov, weight decay": (
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=5e-4),
        -3.0,
        -1.0,
    ),
    "Adam": (torch.optim.Adam, -4.0, -1.7),
    "AdamW": (torch.optim.AdamW, -4.0, -1.7),
    "NAdam": (torch.optim.NAdam, -4.0, -2.0),
    "Adamax": (torch.optim.Adamax, -3.5, -2.0),
    "RMSprop": (torch.optim.RMSprop, -4.0, -2.3),
    "Adagrad": (torch.optim.Adagrad, -2.0, -0.5),
}
SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "constant": lambda _: None,
    "cosine": lambda o: schedules.CosineAnnealingLR(o, STEPS),
    "steps": lambda o: schedules.StepLR(o, 150, 0.1),
    "warm-up": lambda o: schedules.LambdaLR(o, lambda step: min(1.0, (step + 1) / 50)),
}


@dataclass
class Trial:
    """A run that has not begun.

    Attributes:
        classes: 0: the target is a number.
    """

    name: str
    model: nn.Module
    optimizer: Optimizer
    schedule: Any
    loss: Callable[[Tensor, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    batch: int
    classes: int

    def score(self) -> float:
        """Accuracy, or the explained share of the variance, on the held-out quarter."""
        self.model.eval()
        x, y = self.held_out
        with torch.no_grad():
            output = self.model(x)
        if self.classes:
            return float((output.argmax(1) == y).float().mean())
        return float(1.0 - ((output - y) ** 2).mean() / y.var())


@dataclass(frozen=True)
class Pair:
    """One run, left alone and watched; ``remedies`` in words."""

    seed: int
    name: str
    alone: float
    watched: float
    equal: bool
    remedies: list[str]

    @property
    def verdict(self) -> str:
        if self.equal and not self.remedies:
            return "untouched"
        before, after = (s if math.isfinite(s) else -math.inf for s in (self.alone, self.watched))
        if after < before - MARGIN:
            return "worse"
        return "better" if after > before + MARGIN else "as good"

    def __str__(self) -> str:
        done = "; ".join(self.remedies)
        return (
            f"{self.verdict}: seed {self.seed}, {self.name}: "
            f"{self.alone:.3f} → {self.watched:.3f}; {done}"
        )


def draw(seed: int) -> Trial:
    """The run of this seed."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    data = choose.choice(sorted(DATA))
    train, held_out, classes = _data(data)
    if data == "digits" and choose.random() < 0.5:
        model, shape, batch = _model_of_pictures(choose)
    else:
        model, shape, batch = _model(choose, train[0].shape[1], classes)
    name = choose.choice(sorted(OPTIMIZERS))
    make, lowest, highest = OPTIMIZERS[name]
    rate = 10 ** choose.uniform(lowest, highest)
    optimizer = make(model.parameters(), lr=rate)
    schedule = choose.choice(sorted(SCHEDULES))
    loss = F.cross_entropy if classes else choose.choice(LOSSES)
    words = f"{data}, {shape}, batches of {batch}, {name} at {rate:.2g}, {schedule}"
    return Trial(
        f"{words}, {loss.__name__}",
        model,
        optimizer,
        SCHEDULES[schedule](optimizer),
        loss,
        train,
        held_out,
        batch,
        classes,
    )


def run(seed: int, *, watched: bool) -> tuple[float, list[float], list[str]]:
    """Its score, its losses, and the remedies that were applied."""
    trial = draw(seed)
    torch.manual_seed(seed + 1)
    session = None
    if watched:
        session = esper.attach(
            trial.model, trial.optimizer, mode="automatic", server="", verbose=False
        )
    losses = []
    for _ in range(STEPS):
        rows = torch.randint(len(trial.train[0]), (trial.batch,))
        loss = trial.loss(trial.model(trial.train[0][rows]), trial.train[1][rows])
        trial.optimizer.zero_grad()
        torch.autograd.backward(loss)
        trial.optimizer.step()
        if trial.schedule is not None:
            trial.schedule.step()
        if session is not None:
            session.step(loss)
        losses.append(loss.item())
    remedies = []
    if session is not None:
        loop = session._parts.remedies
        given = loop.treatments if loop is not None else ()
        remedies = [f"{entry.remedy} at {entry.step} for {entry.finding}" for entry in given]
        session.close()
    return trial.score(), losses, remedies


def compare(seed: int) -> Pair:
    """The run of this seed, both ways."""
    alone, expected, _ = run(seed, watched=False)
    watched, losses, remedies = run(seed, watched=True)
    # NaN equals NaN here.
    equal = str(losses) == str(expected)
    return Pair(seed, draw(seed).name, alone, watched, equal, remedies)


def table(pairs: Sequence[Pair], seeds: range) -> str:
    """What is printed, and written into the page."""
    count = len(pairs)
    lines = [f"{count} runs of {STEPS} steps, seeds {seeds.start}:{seeds.stop}"]
    for verdict in ("untouched", "as good", "better", "worse"):
        number = sum(pair.verdict == verdict for pair in pairs)
        low, high = wilson(number, count)
        lines.append(f"  {verdict:<10} {number:>4}   {low:.1%} to {high:.1%}")
    lines += ["", *(str(pair) for pair in pairs if pair.verdict != "untouched")]
    return "\n".join(lines)


def wilson(number: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, number / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def _data(name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """(training, held-out, classes); inputs, and a target that is a number, are standardised."""
    found = DATA[name]()
    x = torch.tensor(found.data, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    classes = 0 if name == "diabetes" else len(found.target_names)
    y = torch.tensor(found.target, dtype=torch.long if classes else torch.float32)
    if not classes:
        y = ((y - y.mean()) / y.std())[:, None]
    train, held_out = train_test_split(range(len(x)), test_size=0.25, random_state=0)
    return (x[train], y[train]), (x[held_out], y[held_out]), classes


def _model(choose: random.Random, inputs: int, classes: int) -> tuple[nn.Module, str, int]:
    """(model, what it is, size of the batches)."""
    depth, width = choose.choice((0, 1, 1, 2, 2, 3, 4)), choose.choice(WIDTHS)
    activation = choose.choice(ACTIVATIONS)
    norm = choose.choice((None, None, nn.BatchNorm1d, nn.LayerNorm))
    dropout, batch = choose.choice((0.0, 0.0, 0.1, 0.5)), choose.choice((1, 4, 16, 32, 64, 128))
    if norm is nn.BatchNorm1d:
        batch = max(batch, 16)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(nn.Linear(inputs, width))
        if norm is not None:
            layers.append(norm(width))
        layers.append(activation())
        if dropout:
            layers.append(nn.Dropout(dropout))
        inputs = width
    layers.append(nn.Linear(inputs, classes or 1))
    hidden = f"{depth} × {width} {activation.__name__}" if depth else "no hidden layer"
    parts = [hidden, norm.__name__ if norm and depth else "", f"dropout {dropout}" * bool(dropout)]
    return nn.Sequential(*layers), ", ".join(part for part in parts if part), batch


def _model_of_pictures(choose: random.Random) -> tuple[nn.Module, str, int]:
    """The same of a net that knows the eight rows and columns of a digit."""
    kind, width = (
        choose.choice(("convolutions", "GRU", "LSTM", "attention")),
        choose.choice((8, 32)),
    )
    batch = choose.choice((4, 16, 32, 64))
    return Pictures(kind, width), f"{kind} of {width}", batch


class Pictures(nn.Module):
    """A digit [N, 64] to the scores of ten classes [N, 10]."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.rows = kind != "convolutions"
        body: nn.Module
        if kind == "convolutions":
            body = nn.Sequential(
                nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2), nn.ReLU()
            )
        elif kind == "attention":
            block = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
            body = nn.Sequential(nn.Linear(8, width), block)
        else:
            body = {"GRU": nn.GRU, "LSTM": nn.LSTM}[kind](8, width, batch_first=True)
        self.body = body
        self.head = nn.Linear(width * (8 if self.rows else 4), 10)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.body(pixels.view(-1, 8, 8) if self.rows else pixels.view(-1, 1, 8, 8))
        output = seen[0] if isinstance(seen, tuple) else seen  # of a recurrent net: all rows
        scores: Tensor = self.head(output.flatten(1))
        return scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a run ended worse."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    first, last = map(int, options.seeds.split(":"))
    seeds = range(first, min(last, first + 20) if options.quick else last)
    pairs = [compare(seed) for seed in seeds]
    text = table(pairs, seeds)
    print(f"{text}\n\n{machine()}")
    if options.json:
        options.json.write_text(json.dumps([asdict(pair) for pair in pairs], indent=1))
    if options.docs:
        page = options.docs / PAGE
        before, rest = page.read_text().split(BEGIN)
        _, after = rest.split(END)
        page.write_text(f"{before}{BEGIN}\n```text\n{text}\n```\n\n{machine()}\n{END}{after}")
    return int(any(pair.verdict == "worse" for pair in pairs))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ordinary")
    parser.add_argument("--quick", action="store_true", help="twenty runs")
    parser.add_argument("--seeds", default="3400:3600", help="first:last, without the last")
    parser.add_argument("--json", type=Path, help="write each run there")
    parser.add_argument("--docs", type=Path, help=f"write the table into {PAGE} there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
