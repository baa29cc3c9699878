"""DEForm-T: operators on the weights or the code of a tiny decoder and a tiny encoder.

After DEFault++ (arXiv 2604.28118). The decoder learns the next byte of a text; the encoder which of
the bytes before the last one is equal to it. An operator acts from the start of the training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rescue.cases import Case, Trial
from benchmarks.rescue.faults.at8 import CHARACTERS, data_of

TIER = "DEForm-T"
WIDTH, HEADS, BLOCKS, LENGTH = 32, 4, 2, 8
STEPS = 300
LEARNED = 0.2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = 1 / math.sqrt(WIDTH // HEADS)
        self.mask = "causal"
        self.swapped = False
        self.after: Callable[[Tensor], Tensor] = lambda a: a

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            layer(x).view(n, t, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        if self.swapped:
            v = v.flip(1)
        scores = self.scale * q @ k.transpose(-1, -2)
        ones = torch.ones(t, t, dtype=torch.bool)
        masks = {"causal": ones.tril(), "self": ones.tril().triu()}
        scores = scores.masked_fill(~masks.get(self.mask, ones), -math.inf)
        weights = self.after(scores.softmax(-1))
        out: Tensor = self.out((weights @ v).transpose(1, 2).reshape(n, t, WIDTH))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1: nn.Module = nn.LayerNorm(WIDTH)
        self.norm2: nn.Module = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.residual = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual * x + self.attention(self.norm1(x))
        out: Tensor = self.residual * x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Transformer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CHARACTERS)
        self.pooled = kind == "encoder"
        for block in _blocks(self):
            block.attention.mask = "none" if self.pooled else "causal"

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        out: Tensor = self.head(h.mean(1) if self.pooled else h)
        return out


def next_bytes(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), target.flatten())


def healthy(kind: str, seed: int) -> Trial:
    """The decoder predicts each next byte; the encoder the byte behind its window."""
    torch.manual_seed(seed)
    x, y, held_x, held_y = data_of("text", seed)
    if kind == "decoder":
        y = torch.cat([x[:, 1:], y[:, None]], 1)
        held_y = torch.cat([held_x[:, 1:], held_y[:, None]], 1)
    model = Transformer(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return Trial(model, x, y, held_x, held_y, optimizer, next_bytes, batch=16)


Operator = Callable[[Transformer, float], None]


def _blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _attentions(model: Transformer) -> list[Attention]:
    return [block.attention for block in _blocks(model)]


def zeroed(name: str) -> Operator:
    def apply(model: Transformer, strength: float) -> None:
        for attention in _attentions(model):
            layer = attention.get_submodule(name)
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
                parameter.requires_grad_(False)

    return apply


def frozen(name: str) -> Operator:
    def apply(model: Transformer, strength: float) -> None:
        for attention in _attentions(model):
            attention.get_submodule(name).requires_grad_(False)

    return apply


def masked(mask: str) -> Operator:
    def apply(model: Transformer, strength: float) -> None:
        for attention in _attentions(model):
            attention.mask = mask

    return apply


def scale_of_scores(model: Transformer, strength: float) -> None:
    for attention in _attentions(model):
        attention.scale *= 30 * strength


def scores_vanish(model: Transformer, strength: float) -> None:
    for attention in _attentions(model):
        attention.scale *= 1e-3 / strength


def swapped_heads(model: Transformer, strength: float) -> None:
    for attention in _attentions(model):
        attention.swapped = True


def no_positions(model: Transformer, strength: float) -> None:
    nn.init.zeros_(model.places.weight)
    model.places.weight.requires_grad_(False)


def large_positions(model: Transformer, strength: float) -> None:
    with torch.no_grad():
        model.places.weight.mul_(30 * strength)


def no_norms(model: Transformer, strength: float) -> None:
    for block in _blocks(model):
        block.norm1 = block.norm2 = nn.Identity()


def residual_dropped(model: Transformer, strength: float) -> None:
    for block in _blocks(model):
        block.residual = 0.0


def residual_doubled(model: Transformer, strength: float) -> None:
    for block in _blocks(model):
        block.residual = 3.0 * strength


def large_weights(model: Transformer, strength: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10 * strength)


def dead_feed_forward(model: Transformer, strength: float) -> None:
    with torch.no_grad():
        for block in _blocks(model):
            block.up.bias.fill_(-20 * strength)


def attention_dropped(model: Transformer, strength: float) -> None:
    for attention in _attentions(model):
        attention.after = lambda a: F.dropout(a, 0.9)


def equal_blocks(model: Transformer, strength: float) -> None:
    first = model.blocks[0].state_dict()
    for block in model.blocks:
        block.load_state_dict(first)


def cut_head(model: Transformer, strength: float) -> None:
    model.norm.register_forward_hook(lambda _, __, y: y.detach())


# operator -> (what it does, rules that name it)
OPERATORS: dict[str, tuple[Operator, frozenset[str]]] = {
    "Q zeroed and frozen": (zeroed("q"), frozenset({"frozen_part", "zero_times_zero_adapter"})),
    "K zeroed and frozen": (zeroed("k"), frozenset({"frozen_part", "zero_times_zero_adapter"})),
    "V zeroed and frozen": (zeroed("v"), frozenset({"frozen_part", "zero_times_zero_adapter"})),
    "output zeroed and frozen": (zeroed("out"), frozenset({"frozen_part"})),
    "Q frozen": (frozen("q"), frozenset({"frozen_part"})),
    "V frozen": (frozen("v"), frozenset({"frozen_part"})),
    "mask is missing": (masked("none"), frozenset({"sees_ahead"})),
    "each place sees itself alone": (masked("self"), frozenset()),
    "scores too large": (scale_of_scores, frozenset({"bad_initialisation", "exploding_gradient"})),
    "scores vanish": (scores_vanish, frozenset({"vanishing_gradient"})),
    "heads swapped": (swapped_heads, frozenset()),
    "no positions": (no_positions, frozenset({"frozen_part"})),
    "positions too large": (large_positions, frozenset({"bad_initialisation"})),
    "norms removed": (no_norms, frozenset({"bad_initialisation", "vanishing_gradient"})),
    "residual dropped": (residual_dropped, frozenset({"bad_initialisation", "vanishing_gradient"})),
    "residual tripled": (residual_doubled, frozenset({"bad_initialisation", "exploding_gradient"})),
    "weights too large": (large_weights, frozenset({"bad_initialisation", "exploding_gradient"})),
    "feed-forward dead": (dead_feed_forward, frozenset({"dying_relu", "unreached"})),
    "dropout of 0.9 in attention": (attention_dropped, frozenset({"training_in_eval_mode"})),
    "blocks start equal": (equal_blocks, frozenset({"repeated_initialisation"})),
    "gradient cut before the head": (cut_head, frozenset({"unreached"})),
}


def faulty(kind: str, operator: str, seed: int) -> Trial:
    trial = healthy(kind, seed)
    model = trial.model
    assert isinstance(model, Transformer)
    OPERATORS[operator][0](model, 1.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    trial.optimizer = torch.optim.AdamW(trained, lr=3e-3)
    return trial


def cases(seeds: range) -> Iterator[Case]:
    """Each operator on one of the two models in each seed; only those that hurt count."""
    for seed in seeds:
        for place, (operator, (_, rules)) in enumerate(OPERATORS.items()):
            kind = ("decoder", "encoder")[(place + seed) % 2]
            if kind == "encoder" and operator == "mask is missing":
                kind = "decoder"  # an encoder has no mask
            yield Case(
                TIER, operator, kind, seed, STEPS, functools.partial(faulty, kind, operator, seed),
                functools.partial(healthy, kind, seed), rules=rules, bug=True, learned=LEARNED,
            )  # fmt: skip
