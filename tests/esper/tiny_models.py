"""The shared cast: small models that behave like real ones, and one way to train them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper import blueprints
from esper.contracts import GraftKind, LayerInfo
from esper.grafting import Receipt, Slot, Surroundings, apply_graft, slot_of
from esper.grafting.surroundings import BARE

VOCABULARY = 17
WIDTH = 16
LENGTH = 6
# Reductions between ranks sit in no layer: tests/esper/distributed tries them.
# Without the one that needs two layers, which tests/esper/grafting/test_spans.py grafts.
IN_LAYERS = [
    b.slug
    for b in blueprints.list_blueprints()
    if b.kind is not GraftKind.DISTRIBUTED and b.slug != "widen_hidden"
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(0.2)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.narrow(self.drop(torch.relu(self.wide(x))))


class TinyTransformer(nn.Module):
    """Dropout, attention and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TinyConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.stem(x)))
        h = self.act(self.down(h))
        return self.head(h.mean(dim=(2, 3)))


@dataclass
class Training:
    """A model on fixed batches with everything that a hard undo must bring back."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    batches: list[Tensor] = field(default_factory=list)
    steps: int = 0

    def step(self) -> float:
        tokens = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        self.optimizer.zero_grad()
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.item()

    def run(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]


def make_training(scheduler: str = "one_cycle", steps: int = 200) -> Training:
    torch.manual_seed(7)
    model = TinyTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    made: Any = None
    if scheduler == "one_cycle":
        made = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    if scheduler == "lambda":
        made = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + 0.01 * step))
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCABULARY, (4, LENGTH + 1), generator=generator) for _ in range(5)]
    return Training(model, optimizer, made, batches)


def surroundings_of(training: Training) -> Surroundings:
    schedulers = [] if training.scheduler is None else [training.scheduler]
    return Surroundings([training.optimizer], schedulers)


def holds_nothing(host: nn.Module) -> bool:
    """The layer has no slot, or an idle one."""
    slot = slot_of(host)
    return slot is None or is_idle(slot)


def is_idle(slot: Slot | None) -> bool:
    """The slot is there, and holds neither a graft nor a watcher."""
    return slot is not None and not slot._modules and not slot._watchers


def meet_requirements(
    model: nn.Module,
    layer: LayerInfo,
    blueprint: blueprints.Blueprint,
    surroundings: Surroundings = BARE,
) -> tuple[Receipt, ...]:
    """Grafts what the blueprint must find on the layer, if that fits."""
    if not blueprint.requires:
        return ()
    needed = blueprints.get_blueprint(max(blueprint.requires))
    if needed.supports(layer):
        return ()
    return (apply_graft(model, layer, needed, seed=9, surroundings=surroundings),)
