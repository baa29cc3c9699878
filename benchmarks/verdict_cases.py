"""Trainings in which grafts are compared with a twin that was trained without them.

Each host is trained to the graft, and from there once unchanged (the twin), once for each of some
changed learning rates, and once for each graft: on the same batches in the same order. A graft's
true gain is the held-out loss of its twin minus its own at the end of the run.

Data come with packages: scikit-learn's digits, generated regressions, and the text of
``pydoc_data.topics``.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper import blueprints, grafting
from esper.exceptions import EsperError

GRAFT_STEP = 1_000
STEPS_AFTER = 1_000
LOOK_STEPS = 25
END_STEPS = 300  # the true gain is the mean over so many last steps
MOST_PARAMETERS = 60_000
RATES = (0.5, 2.0)  # arms that only change the learning rate
GRAFTS = (
    "proj_lora_64",
    "proj_ia3",
    "proj_lora_ia3",
    "mlp_gelu_2048",
    "mlp_swiglu_4096",
    "expert_mlp_1d",
    "attn_std",
    "attn_split_qk",
    "block_attn_mlp",
)
Batches = Callable[[int], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Points = list[tuple[int, float]]


@dataclass
class Host:
    """A model in training.

    Attributes:
        batches: the batch of a step; equal for equal steps.
        held_out: inputs and targets of the held-out loss.
        rate: step -> the factor of its learning rate.
    """

    kind: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    held_out: tuple[Tensor, Tensor]
    loss: Loss
    rate: Callable[[int], float] = lambda step: 1.0

    @torch.no_grad()
    def evaluate(self) -> float:
        self.model.eval()
        value = float(self.loss(self.model(self.held_out[0]), self.held_out[1]))
        self.model.train()
        return value

    def fork(self) -> Host:
        """An independent copy of model and optimizer."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return Host(self.kind, model, optimizer, self.batches, self.held_out, self.loss, self.rate)


@dataclass
class Case:
    """A graft and all that was measured of it.

    Attributes:
        before, after: (step, training loss) until the graft, and after it.
        held_before: (step, held-out loss) until the graft.
        looks: (step, held-out loss with the graft, without it).
        twin: (step, held-out loss) of the unchanged run after the graft's step.
        twin_after: (step, training loss) of the unchanged run after the graft's step.
        rates: held-out loss at the end with a changed learning rate, by factor.
        seconds: of a training step without the graft, and with it.
    """

    seed: int
    kind: str
    layer: str
    blueprint: str
    config: dict[str, Any]
    parameters: int
    model_parameters: int
    before: Points
    held_before: Points
    after: Points = field(default_factory=list)
    looks: list[tuple[int, float, float]] = field(default_factory=list)
    twin: Points = field(default_factory=list)
    twin_after: Points = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)


def cases_of(seed: int, grafts: int = 5) -> list[Case]:
    """All cases of one host."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    host = make_host(rng)
    before, held = run(host, 1, GRAFT_STEP)
    twin = host.fork()
    twin_after, twin_held = run(twin, GRAFT_STEP + 1, GRAFT_STEP + STEPS_AFTER)
    rates = {str(factor): changed_rate(host.fork(), factor) for factor in RATES}
    parameters = sum(p.numel() for p in host.model.parameters())
    found = []
    for layer, slug, config in choices(host, rng)[:grafts]:
        case = Case(
            seed=seed,
            kind=host.kind,
            layer=layer,
            blueprint=slug,
            config=config,
            parameters=0,
            model_parameters=parameters,
            before=before,
            held_before=held,
            twin=twin_held,
            twin_after=twin_after,
            rates=rates,
        )
        try:
            grafted(host.fork(), case)
        except EsperError:
            continue
        found.append(case)
    return found


def run(host: Host, first: int, last: int, each: Callable[[int], None] | None = None) -> Any:
    """Trains; returns training losses and held-out losses with their steps."""
    losses, held = [], []
    rates = [group["lr"] for group in host.optimizer.param_groups]
    for step in range(first, last + 1):
        for group, rate in zip(host.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * host.rate(step)
        x, y = host.batches(step)
        host.optimizer.zero_grad()
        loss = host.loss(host.model(x), y)
        torch.autograd.backward(loss)
        host.optimizer.step()
        losses.append((step, loss.item()))
        if each is not None:
            each(step)
        elif step % LOOK_STEPS == 0:
            held.append((step, host.evaluate()))
    for group, rate in zip(host.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return losses, held


def changed_rate(host: Host, factor: float) -> float:
    for group in host.optimizer.param_groups:
        group["lr"] *= factor
    _, held = run(host, GRAFT_STEP + 1, GRAFT_STEP + STEPS_AFTER)
    return end_level(held)


def end_level(held: Points) -> float:
    """Mean held-out loss over the last :data:`END_STEPS`."""
    return float(np.mean([loss for step, loss in held if step > held[-1][0] - END_STEPS]))


def grafted(host: Host, case: Case) -> None:
    torch.manual_seed(case.seed)
    sample = host.batches(1)[0]
    receipt = esper.graft(
        host.model,
        case.layer,
        case.blueprint,
        optimizer=host.optimizer,
        sample=sample,
        **case.config,
    )
    case.parameters = receipt.certificate.parameters
    slot = grafting.slot_of(grafting.find_host(host.model, case.layer))
    assert slot is not None

    def each(step: int) -> None:
        receipt.graft.on_step()
        if step % LOOK_STEPS == 0:
            on = host.evaluate()
            with slot.without(case.blueprint):
                off = host.evaluate()
            case.looks.append((step, on, off))

    case.after, _ = run(host, GRAFT_STEP + 1, GRAFT_STEP + STEPS_AFTER, each)


def choices(host: Host, rng: random.Random) -> list[tuple[str, str, dict[str, Any]]]:
    """(layer, blueprint, config) in random order: each blueprint at most once for each layer."""
    layers = grafting.trace_layers(host.model, lambda: host.model(host.batches(1)[0]))
    found = []
    for info in layers:
        if not info.graftable:
            continue
        for slug in GRAFTS:
            blueprint = blueprints.get_blueprint(slug)
            if blueprint.supports(info):
                continue
            sizes = [c for c in blueprint.sizes(info) if _small(blueprint, info, c)]
            if not sizes:
                continue
            config = dict(rng.choice(sizes))
            if "alpha" in config and rng.random() < 0.3:
                config["alpha"] = 128.0
            found.append((info.name, slug, config))
    rng.shuffle(found)
    return found


def _small(blueprint: Any, info: Any, config: dict[str, Any]) -> bool:
    """Experts are trained one after the other, so large ones take minutes."""
    most = 4_000 if "expert" in blueprint.slug else MOST_PARAMETERS
    return int(blueprint.forecast(info, config).parameters) <= most


# --- hosts ----------------------------------------------------------------------------------------


def make_host(rng: random.Random) -> Host:
    kinds = [digits_mlp, digits_few, digits_cnn, teacher, friedman, text_mlp, text_attention]
    weights = [3, 3, 2, 4, 3, 3, 1]
    host = rng.choices(kinds, weights)[0](rng)
    if rng.random() < 0.3:
        total = GRAFT_STEP + STEPS_AFTER
        host.rate = lambda step: 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total))) + 0.01
    return host


def optimizer_for(model: nn.Module, rng: random.Random) -> torch.optim.Optimizer:
    if rng.random() < 0.75:
        rate = rng.choice([3e-4, 1e-3, 3e-3, 1e-2])
        return torch.optim.AdamW(model.parameters(), lr=rate)
    return torch.optim.SGD(model.parameters(), lr=rng.choice([0.01, 0.03, 0.1]), momentum=0.9)


def fixed(
    kind: str,
    model: nn.Module,
    rng: random.Random,
    x: Tensor,
    y: Tensor,
    train: int,
    loss: Loss,
    batch: int = 64,
) -> Host:
    """Batches from the first ``train`` rows; the others are held out."""
    seed = rng.randrange(2**31)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(np.random.default_rng((seed, step)).integers(0, train, batch))
        return x[rows], y[rows]

    held = x[train : train + 600], y[train : train + 600]
    return Host(kind, model, optimizer_for(model, rng), batches, held, loss)


def perceptron(inputs: int, width: int, outputs: int, rng: random.Random) -> nn.Module:
    act = rng.choice([nn.ReLU, nn.Tanh, nn.GELU])
    depth = rng.choice([1, 2])
    parts: list[nn.Module] = [nn.Linear(inputs, width), act()]
    for _ in range(depth - 1):
        parts += [nn.Linear(width, width), act()]
    return nn.Sequential(*parts, nn.Linear(width, outputs))


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.data))
    x = torch.tensor(data.data[order] / 16.0, dtype=torch.float32)
    return x, torch.tensor(data.target[order])


def shuffled(x: Tensor, y: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
    order = torch.from_numpy(np.random.default_rng(rng.randrange(2**31)).permutation(len(x)))
    return x[order], y[order]


def digits_mlp(rng: random.Random) -> Host:
    x, y = shuffled(*digits(), rng)
    model = perceptron(64, rng.choice([4, 6, 8, 12]), 10, rng)
    return fixed("digits", model, rng, x, y, 1197, F.cross_entropy)


def digits_few(rng: random.Random) -> Host:
    x, y = shuffled(*digits(), rng)
    y = torch.where(torch.rand(len(y)) < 0.1, torch.randint(0, 10, y.shape), y)
    model = perceptron(64, rng.choice([6, 12, 24]), 10, rng)
    return fixed("few digits", model, rng, x, y, rng.choice([200, 400]), F.cross_entropy, 32)


def digits_cnn(rng: random.Random) -> Host:
    x, y = shuffled(*digits(), rng)
    c = rng.choice([2, 3, 4])
    model = nn.Sequential(
        nn.Conv2d(1, c, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(c, c, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * c, 10),
    )
    return fixed("cnn", model, rng, x.view(-1, 1, 8, 8), y, 1197, F.cross_entropy, 32)


def teacher(rng: random.Random) -> Host:
    inside = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8))
    model = perceptron(16, rng.choice([2, 3, 4, 6]), 8, rng)
    seed, noise = rng.randrange(2**31), rng.choice([0.0, 0.1, 0.3])

    @torch.no_grad()
    def draw(key: int, rows: int) -> tuple[Tensor, Tensor]:
        values = np.random.default_rng((seed, key)).standard_normal((rows, 24))
        numbers = torch.tensor(values, dtype=torch.float32)
        return numbers[:, :16], inside(numbers[:, :16]) + noise * numbers[:, 16:]

    held, optimizer = draw(0, 600), optimizer_for(model, rng)
    return Host("teacher", model, optimizer, lambda step: draw(step, 64), held, F.mse_loss)


def friedman(rng: random.Random) -> Host:
    size = rng.choice([200, 1000])
    noise, state = rng.choice([0.5, 2.0]), rng.randrange(9999)
    x, y = make_friedman1(size + 600, noise=noise, random_state=state)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y[:, None] / 5, dtype=torch.float32)
    model = perceptron(10, rng.choice([4, 8, 32]), 1, rng)
    return fixed("friedman", model, rng, x, y, size, F.mse_loss, 32)


@cache
def text() -> Tensor:
    from pydoc_data.topics import topics

    joined = "".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")[:300_000]
    codes = np.frombuffer(joined, dtype=np.uint8)
    return torch.from_numpy(np.unique(codes, return_inverse=True)[1].astype(np.int64))


def characters(
    kind: str, model: nn.Module, rng: random.Random, length: int, batch: int, rows: int, whole: bool
) -> Host:
    codes, seed, cut = text(), rng.randrange(2**31), 250_000

    def draw(key: int, count: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        starts = np.random.default_rng((seed, key)).integers(low, high - length - 1, count)
        index = torch.from_numpy(starts)[:, None] + torch.arange(length + 1)
        window = codes[index]
        return window[:, :-1], window[:, 1:].flatten() if whole else window[:, -1]

    held = draw(0, rows, cut, len(codes))
    return Host(
        kind,
        model,
        optimizer_for(model, rng),
        lambda s: draw(s, batch, 0, cut),
        held,
        F.cross_entropy,
    )


def text_mlp(rng: random.Random) -> Host:
    width, vocabulary = rng.choice([8, 16, 32]), int(text().max()) + 1
    model = nn.Sequential(
        nn.Embedding(vocabulary, 8),
        nn.Flatten(),
        nn.Linear(64, width),
        nn.Tanh(),
        nn.Linear(width, vocabulary),
    )
    return characters("text", model, rng, 8, 64, 1000, False)


class Decoder(nn.Module):
    """One block with causal attention over a short text."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.tokens(codes) + self.places
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.down(F.gelu(self.up(x)))
        logits: Tensor = self.head(x).flatten(0, 1)
        return logits


def text_attention(rng: random.Random) -> Host:
    model = Decoder(int(text().max()) + 1, rng.choice([12, 24]), 24)
    return characters("decoder", model, rng, 24, 16, 48, True)
