"""No rule raises an alarm in a healthy training; an alarm is a finding above ``info``."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.esper.diagnosis.small_runs import Run, adam, circles, cosine, deep, digits, perceptron

LENGTH = 16


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.norm_wide = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        out: Tensor = x + self.narrow(F.gelu(self.wide(self.norm_wide(x))))
        return out


class LanguageModel(nn.Module):
    """A decoder of two blocks on bytes."""

    def __init__(self, width: int = 32, *, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(128, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList([Attention(width), Attention(width)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def text() -> tuple[Tensor, Tensor]:
    import pydoc_data.topics as topics

    words = " ".join(topics.topics.values())[:20_000]
    codes = torch.tensor([min(ord(c), 127) for c in words])
    rows = codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return rows[:, :-1], rows[:, 1:]


def next_byte(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), target.flatten())


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)


def lazy() -> Run:
    """Its loss stands still for hundreds of steps, and then falls: the parity of four inputs."""
    torch.manual_seed(0)
    x = torch.randint(0, 2, (512, 8)).float() * 2 - 1
    y = (x[:, :4].prod(1) > 0).long()
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    return Run(model, (x, y), optimizer=sgd_slow, steps=1500)


def sgd_slow(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def regression() -> Run:
    x, _ = digits()
    target = torch.sin(x @ torch.randn(64, 1))
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1))
    return Run(model, (x, target), loss=F.mse_loss, steps=600)


def variational() -> Run:
    """An autoencoder: its targets are its inputs, and its loss is a sum."""
    x, _ = digits()
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64), nn.Sigmoid())
    loss: Callable[[Tensor, Tensor], Tensor] = F.binary_cross_entropy
    return Run(model, (x, x), loss=loss, steps=600)


KINDS: dict[str, Callable[[], Run]] = {
    # The plain perceptron on digits is the twin of many rules in test_rules_on_runs.py.
    "perceptron with dropout, no loss tensor": lambda: Run(
        perceptron(0.2), steps=800, passes_number=True
    ),
    "convolutions with batch norm": lambda: Run(convolutional(), steps=600),
    "language model": lambda: Run(
        LanguageModel(), text(), loss=next_byte, optimizer=adamw, steps=600
    ),
    "tied language model, warm-up and cosine": lambda: Run(
        LanguageModel(tied=True),
        text(),
        loss=next_byte,
        optimizer=adamw,
        schedule=cosine(50, 600),
        steps=600,
    ),
    "SGD with momentum": lambda: Run(optimizer=sgd, steps=800),
    "warm-up and cosine to zero": lambda: Run(
        optimizer=lambda model: adam(model, 3e-3), schedule=cosine(100, 800), steps=800
    ),
    "late fall": lazy,
    "deep tanh": lambda: Run(deep(8, nn.Tanh), circles(), steps=600),
    "deep ReLU": lambda: Run(deep(6, nn.ReLU, width=16), circles(), steps=600),
    "regression": regression,
    "autoencoder": variational,
    "batches of two": lambda: Run(batch=2, steps=800),
    "the whole data": lambda: Run(batch=1797, steps=200),
    "learned to the end": lambda: Run(optimizer=lambda model: adam(model, 1e-2), steps=2000),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_healthy_run_has_no_alarm(kind: Callable[[], Run]) -> None:
    torch.manual_seed(0)
    result = kind().go()
    assert result.alarms() == []
    assert math.isfinite(result.losses[-1])
