"""Each rule finds its fault in a real small training, and is quiet in the twin without it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F

import esper
from esper.contracts import Severity
from esper.diagnosis import forward_probe
from esper.diagnosis.base import Memory
from esper.diagnosis.facts import LossKind, ModelPass
from esper.diagnosis.observation import Observation
from esper.diagnosis.plan import Plan, undisturbed_time
from esper.diagnosis.recorder import Recorder
from esper.diagnosis.rules.imbalanced_classes import ImbalancedClasses
from esper.diagnosis.rules.sees_ahead import SeesAhead
from esper.diagnosis.rules.wrong_loss import WrongLoss
from esper.diagnosis.sequences import FirstPlaces, ahead_of
from esper.fail_closed import FailClosed
from esper.health.transfers import HostTransfer
from tests.esper.diagnosis.small_runs import (
    Detached,
    Loss,
    Run,
    adam,
    circles,
    cosine,
    deep,
    digits,
    perceptron,
    scaled,
)


@dataclass(frozen=True)
class Case:
    """``within``: the step by which the fault must be found; ``layer``: where it began."""

    slug: str
    faulty: Callable[[], Run]
    healthy: Callable[[], Run]
    within: int
    layer: str | None = None


def spoil_input(run: Run, step: int) -> None:
    if step == 20:
        x, y = run.data
        run.data = (torch.full_like(x, float("nan")), y)


def kill_units(model: nn.Sequential, layer: int) -> nn.Sequential:
    with torch.no_grad():
        model[layer].bias.fill_(-100.0)
    return model


def only_norms(*, frozen: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10))
    for module in model:
        if isinstance(module, nn.Linear) and frozen:
            module.requires_grad_(False)
    return model


def never_learns(rate: float) -> Run:
    """A deep net on points; at a large rate its updates are not huge, and nothing is learned."""
    return Run(
        deep(7), circles(), optimizer=lambda m: torch.optim.SGD(m.parameters(), rate, momentum=0.9)
    )


def forgets_its_inputs(rate: float) -> Run:
    """At a large rate only the frequencies of four unequal classes are learned."""
    layers = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    encoder = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layers, 2), nn.Flatten())
    x, y = digits()
    model = nn.Sequential(nn.Unflatten(1, (8, 8)), encoder, nn.Linear(128, 4))
    return Run(model, (x, y.clamp(max=3)), optimizer=lambda m: adam(m, rate))


def linear(activation: Callable[[], nn.Module]) -> nn.Module:
    layers = [nn.Linear(64, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 10)]
    return nn.Sequential(*layers)


def one_output() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


def with_empty_layer(frozen: bool) -> nn.Module:
    """A frozen layer that is all zero, or one that has weights."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 10))
    if frozen:
        nn.init.zeros_(model[2].weight)
    model[2].requires_grad_(False)
    return model


def stop_training_mode(run: Run, step: int) -> None:
    run.model.train(step < 20)


def raise_rate(run: Run, step: int) -> None:
    if step == 30:
        for group in run.opt.param_groups:
            group["lr"] *= 1000


def restarts(step: int) -> float:
    """A warm-up, then two periods of a cosine that returns to the highest rate."""
    return step / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step % 25) / 25))


def spoil_weights(run: Run, step: int) -> None:
    if step == 30:
        with torch.no_grad():
            run.model[5].weight.mul_(100.0)  # type: ignore[index,union-attr,operator]


def without_bias(model: nn.Module) -> nn.Module:
    """What shrinks from layer to layer still differs from row to row as much as the inputs."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def constant(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    return model


def holds_half(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(model.parameters())[:2], lr=1e-3)


def of_a_copy(model: nn.Module) -> torch.optim.Optimizer:
    """It holds the model's tensors, and makes steps that round away."""
    model.to(torch.bfloat16)
    return torch.optim.SGD(model.parameters(), lr=1e-7)


def usual() -> Run:
    """It is as long as the longest that is compared with it."""
    return Run(steps=2600)


CASES = [
    Case("non_finite", lambda: Run(before=spoil_input), Run, 20),
    Case(
        "loss_spike",
        lambda: Run(before=spoil_weights, optimizer=sgd),
        lambda: Run(optimizer=sgd),
        50,
    ),
    Case("rate_jump", lambda: Run(before=raise_rate), lambda: Run(schedule=restarts), 40),
    Case("gradients_not_zeroed", lambda: Run(zero_grad_every=1000), Run, 2),
    Case("accumulation_miscounted", lambda: Run(zero_grad_every=3), Run, 20),
    Case("not_held", lambda: Run(optimizer=holds_half), Run, 1, "3"),
    Case(
        "frozen_part",
        lambda: Run(only_norms(frozen=True)),
        lambda: Run(only_norms(frozen=False)),
        1,
        "0",
    ),
    Case(
        "unreached", lambda: Run(Detached(cut=True)), lambda: Run(Detached(cut=False)), 3, "middle"
    ),
    Case("nothing_moves", lambda: Run(optimizer=of_a_copy, data=halves()), Run, 3),
    Case(
        "training_in_eval_mode",
        lambda: Run(perceptron(0.1), before=stop_training_mode),
        lambda: Run(perceptron(0.1)),
        22,
    ),
    Case(
        "vanishing_gradient",
        lambda: Run(deep(10, nn.Sigmoid), circles()),
        lambda: Run(deep(6, nn.Tanh), circles()),
        3,
    ),
    Case(
        "exploding_gradient",
        lambda: Run(scaled(deep(12, nn.ReLU, width=16), 6.0), circles()),  # type: ignore[arg-type]
        lambda: Run(deep(12, nn.ReLU, width=16), circles()),
        10,
    ),
    Case("dying_relu", lambda: Run(kill_units(perceptron(), 3)), Run, 10, "3"),
    Case("update_ratio_high", lambda: Run(optimizer=lambda model: adam(model, 1.0)), Run, 2),
    Case(
        "bad_initialisation",
        lambda: Run(without_bias(scaled(deep(9, nn.Tanh, width=16), 0.3)), circles()),
        lambda: Run(without_bias(deep(9, nn.Tanh, width=16)), circles()),
        1,
    ),
    Case(
        "wrong_output_activation",
        lambda: Run(ending(nn.Softmax(1))),
        lambda: Run(ending(nn.Identity())),
        1,
    ),
    Case(
        "wrong_loss",
        lambda: Run(loss=F.nll_loss),
        lambda: Run(ending(nn.LogSoftmax(1)), loss=F.nll_loss),
        1,
    ),
    Case("no_activation", lambda: Run(linear(nn.Identity)), lambda: Run(linear(nn.ReLU)), 1, "0"),
    Case(
        "wrong_loss",
        lambda: Run(one_output(), loss=lambda y, t: F.cross_entropy(y, torch.zeros_like(t))),
        lambda: Run(one_output(), loss=lambda y, t: F.mse_loss(y.squeeze(1), t / 4.5 - 1)),
        3,
    ),
    Case(
        "wrong_loss",
        lambda: Run(one_output(), loss=lambda y, t: F.mse_loss(y.squeeze(1), t.float())),
        lambda: Run(one_output(), loss=lambda y, t: F.mse_loss(y.squeeze(1), t / 4.5 - 1)),
        1,
    ),
    Case(
        "frozen_part", lambda: Run(with_empty_layer(True)), lambda: Run(with_empty_layer(False)), 1
    ),
    Case("update_ratio_high", lambda: never_learns(0.3), lambda: never_learns(0.01), 60),
    Case(
        "update_ratio_high", lambda: forgets_its_inputs(0.05), lambda: forgets_its_inputs(3e-3), 60
    ),
    Case("abnormal_data", lambda: Run(data=digits(1000.0)), Run, 1, "0"),
    Case(
        "saturation",
        lambda: Run(scaled(deep(6, nn.Tanh, width=16), 12.0), circles()),
        lambda: Run(deep(6, nn.Tanh, width=16), circles()),
        50,
    ),
    Case(
        "bad_initialisation",
        lambda: Run(scaled(deep(8, nn.Tanh), 0.05), circles()),
        lambda: Run(deep(8, nn.Tanh), circles()),
        1,
    ),
    Case(
        "bad_initialisation",
        lambda: Run(scaled(deep(8, nn.ReLU, width=16), 4.0), circles()),
        lambda: Run(deep(8, nn.ReLU, width=16), circles()),
        1,
    ),
    Case(
        "update_ratio_low",
        lambda: Run(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1e-5)),
        lambda: Run(optimizer=sgd),
        60,
    ),
    Case(
        "update_ratio_low",
        lambda: Run(optimizer=sgd, schedule=lambda step: 1e-5 * (1 + step / 1e5), steps=160),
        lambda: Run(optimizer=sgd, schedule=lambda step: min(1.0, step / 1e4), steps=160),
        150,
    ),
    Case(
        "bad_initialisation", lambda: Run(Recurrent(-10.0)), lambda: Run(Recurrent(0.0)), 1, "lstm"
    ),
    Case(
        "slow_convergence",
        lambda: Run(
            perceptron(),
            shuffled(),
            optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
            steps=320,
        ),
        usual,
        320,
    ),
    Case(
        "oscillating_loss",
        lambda: Run(deep(2, nn.Tanh, width=16), circles(), optimizer=fast, steps=160, sampling=10),
        lambda: Run(deep(2, nn.Tanh, width=16), circles(), steps=160),
        160,
    ),
    Case(
        "plateau",
        lambda: Run(flat(), steps=2600, data=labels_only()),
        usual,
        2600,
    ),
    Case("over_fitting", lambda: overfits(60), lambda: overfits(1500), 2500),
    Case("memorised_noise", lambda: memorises(noise=True), lambda: memorises(noise=False), 2000),
    Case("tied_by_mistake", lambda: Run(stacked(same=True)), lambda: Run(stacked(same=False)), 1),
    Case(
        "evaluation_in_train_mode",
        lambda: Run(normed(), before=evaluate_now(evaluating=False), steps=150),
        lambda: Run(normed(), before=evaluate_now(evaluating=True), steps=150),
        100,
    ),
    Case("loss_not_reduced", lambda: Run(loss=summed), Run, 1),
    Case(
        "zero_times_zero_adapter",
        lambda: Run(Adapted(both=True)),
        lambda: Run(Adapted(both=False)),
        1,
        "adapter.a",
    ),
    Case(
        "dead_experts", lambda: Run(Experts(2), steps=200), lambda: Run(Experts(6), steps=200), 160
    ),
    Case("repeated_initialisation", lambda: Run(constant(perceptron())), Run, 1, "0"),
    Case("weight_decay_high", lambda: decays(0.3), lambda: decays(5e-4), 1),
    Case(
        "weight_decay_high",
        lambda: Run(optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=20)),
        lambda: Run(optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=1)),
        1,
    ),
    Case(
        "weight_decay_high",
        lambda: Run(optimizer=lambda m: torch.optim.Adam(m.parameters(), 1e-3, weight_decay=3)),
        lambda: Run(optimizer=lambda m: torch.optim.Adam(m.parameters(), 1e-3, weight_decay=1e-3)),
        1,
    ),
    Case(
        "momentum_high",
        lambda: Run(optimizer=lambda m: torch.optim.SGD(m.parameters(), 1e-3, momentum=0.999)),
        lambda: Run(optimizer=lambda m: torch.optim.SGD(m.parameters(), 1e-3, momentum=0.99)),
        1,
    ),
    Case("dropout_high", lambda: Run(perceptron(0.95)), lambda: Run(perceptron(0.5)), 1, "2"),
    Case(
        "few_in_batch_norm",
        lambda: Run(normed(), batch=3),
        lambda: Run(normed(), batch=16, before=ending_with_few_rows),
        10,
        "1",
    ),
    Case(
        "batch_norm_momentum",
        lambda: Run(normed(momentum=0.99)),
        lambda: Run(normed(momentum=None)),
        1,
        "1",
    ),
    Case("batch_norm_momentum", lambda: Run(normed(momentum=0.0)), lambda: Run(normed()), 1, "1"),
    Case(
        "frozen_at_random",
        lambda: Run(with_frozen_trunk(trained=False)),
        lambda: Run(with_frozen_trunk(trained=True)),
        1,
        "0",
    ),
    Case(
        "frozen_at_random",
        lambda: Run(as_transformers_make_it(trained=False)),
        lambda: Run(as_transformers_make_it(trained=True)),
        1,
        "0",
    ),
    Case(
        "constant_output",
        lambda: Run(Averaging(axis=0)),
        lambda: Run(Averaging(axis=1)),
        50,
    ),
    Case("sorted_data", lambda: Run(before=one_class_at_a_time), Run, 10),
    Case("no_gradient", lambda: Run(optimizer=clears_too_late), Run, 3),
    Case("no_gradient", lambda: Run(loss=of_numbers), Run, 3),
    Case(
        "update_ratio_low",
        lambda: Run(optimizer=sgd, schedule=lambda step: step * 1e-7, steps=460),
        lambda: Run(optimizer=sgd, schedule=lambda step: step / 460, steps=460),
        460,
    ),
    Case("betas_swapped", lambda: betas(0.999, 0.9), lambda: betas(0.95, 0.98), 1),
    Case(
        "group_without_rate",
        lambda: Run(optimizer=lambda m: in_groups(m, 0.0)),
        lambda: Run(optimizer=lambda m: in_groups(m, 1e-4)),
        30,
        "0",
    ),
    Case(
        "group_without_rate",
        lambda: Run(optimizer=lambda m: in_groups(m, 0.0), schedule=cosine(20, 60)),
        lambda: Run(optimizer=lambda m: in_groups(m, 1e-4), schedule=cosine(20, 60)),
        30,
        "0",
    ),
    Case(
        "gradient_below_eps",
        lambda: Run(loss=divided_by(1e8)),
        lambda: Run(loss=divided_by(1e3)),
        1,
    ),
    Case("clipped_to_nothing", lambda: clipped(1e-9), lambda: clipped(1.0), 5),
    Case("clipped_to_nothing", lambda: clipped(1e-6, True), lambda: clipped(0.1, True), 5),
    Case("softmax_over_batch", lambda: normalised(0), lambda: normalised(1), 1),
    Case("targets_far", lambda: far_targets(3e4), lambda: far_targets(1.0), 50),
    Case(
        "wrong_loss",
        lambda: Run(ending(nn.LogSoftmax(1)), loss=lambda y, t: -F.nll_loss(y, t)),
        lambda: Run(ending(nn.LogSoftmax(1)), loss=punished),
        1,
    ),
]


def betas(first: float, second: float) -> Run:
    return Run(optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-3, betas=(first, second)))


def in_groups(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """The first layer has a learning rate of its own."""
    first, *rest = model
    others = [parameter for module in rest for parameter in module.parameters()]
    return torch.optim.Adam([{"params": first.parameters(), "lr": rate}, {"params": others}])


def clipped(limit: float, each: bool = False) -> Run:
    clip = nn.utils.clip_grad_value_ if each else nn.utils.clip_grad_norm_

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        made = torch.optim.SGD(model.parameters(), lr=0.1)
        made.register_step_pre_hook(lambda *_: clip(model.parameters(), limit) and None)
        return made

    return Run(optimizer=optimizer)


def divided_by(number: float) -> Loss:
    return lambda out, target: F.cross_entropy(out, target) / number


def normalised(axis: int) -> Run:
    return Run(
        ending(nn.Softmax(axis)), loss=lambda p, target: F.nll_loss(torch.log(p + 1e-9), target)
    )


def far_targets(size: float) -> Run:
    def loss(out: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(out.squeeze(1), size * (1 + target.float() / 9 - 0.05))

    return Run(one_output(), loss=loss)


def punished(out: Tensor, target: Tensor) -> Tensor:
    """REINFORCE: a wrong answer has a reward of -1, the right one of 0."""
    chosen = torch.distributions.Categorical(logits=out).sample()
    log_p = out.gather(1, chosen[:, None]).squeeze(1)
    return (log_p * (chosen != target)).mean()


class ClearsTooLate(torch.optim.Adam):
    """The script clears the gradients between backward and the step."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.zero_grad(set_to_none=False)
        super().step()


def clears_too_late(model: nn.Module) -> torch.optim.Optimizer:
    return ClearsTooLate(model.parameters(), lr=1e-3)


def of_numbers(out: Tensor, target: Tensor) -> Tensor:
    """The loss has lost its way back to the model."""
    return F.cross_entropy(out, target).detach().requires_grad_()


def decays(value: float) -> Run:
    return Run(
        optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=value)
    )


def ending_with_few_rows(run: Run, step: int) -> None:
    """Each tenth batch is the small rest of an epoch."""
    run.batch = 3 if step % 10 == 0 else 16


def as_transformers_make_it(*, trained: bool) -> nn.Module:
    """A frozen trunk whose matrices are normal, as from_config gives it, and a head."""
    model = nn.Sequential(
        nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.LayerNorm(32),
        nn.GELU(), nn.Linear(32, 10),
    )  # fmt: skip
    for module in model[:6]:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
            nn.init.zeros_(module.bias)
    if trained:
        x, y = digits()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    model[:6].requires_grad_(requires_grad=False)
    return model


def with_frozen_trunk(*, trained: bool) -> nn.Module:
    model = perceptron()
    if trained:
        x, y = digits()
        opt = adam(model, 3e-3)
        for _ in range(30):
            opt.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x), y))
            opt.step()
    model[-1] = nn.Linear(32, 10)
    model[:-1].requires_grad_(False)
    return model


class Averaging(nn.Module):
    """The mean over the units in groups of four; by mistake over the rows of the batch."""

    def __init__(self, *, axis: int) -> None:
        super().__init__()
        self.axis, self.features, self.head = axis, nn.Linear(64, 32), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.features(x)).view(len(x), 4, 8)
        h = h.mean(self.axis, keepdim=True).expand_as(h).mean(1)
        out: Tensor = self.head(h)
        return out


def one_class_at_a_time(run: Run, step: int) -> None:
    x, y = digits()
    rows = y == step % 10
    run.data = x[rows], y[rows]


def ending(last: nn.Module) -> nn.Module:
    return nn.Sequential(*perceptron(), last)


def summed(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out, target, reduction="sum")


def shuffled() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x, y[torch.randperm(len(y))]


def labels_only() -> tuple[Tensor, Tensor]:
    """Nothing in the inputs tells the labels."""
    _, y = digits()
    return torch.ones(len(y), 64), y


def flat() -> nn.Module:
    return nn.Linear(64, 10)


def fast(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=10.0)


def split(rows: int, *, noise: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = digits()
    order = torch.randperm(len(x))
    x, y = x[order], torch.randint(0, 10, y.shape) if noise else y[order]
    return x[:rows], y[:rows], x[1500:], y[1500:]


def held_out(x: Tensor, y: Tensor) -> Callable[[nn.Module], float]:
    return lambda model: F.cross_entropy(model(x), y).item()


def overfits(rows: int) -> Run:
    x, y, held_x, held_y = split(rows)
    y = torch.where(torch.rand(len(y)) < 0.3, torch.randint(0, 10, y.shape), y)
    steps = 2500 if rows < 100 else 900
    return Run(
        perceptron(), (x, y), evaluate=held_out(held_x, held_y), steps=steps,
        optimizer=lambda model: adam(model, 3e-3),
    )  # fmt: skip


def memorises(*, noise: bool) -> Run:
    x, y, held_x, held_y = split(200 if noise else 1500, noise=noise)
    return Run(
        perceptron(), (x, y), evaluate=held_out(held_x, held_y), steps=2000 if noise else 500,
        optimizer=lambda model: adam(model, 3e-3),
    )  # fmt: skip


def stacked(*, same: bool) -> nn.Module:
    one = nn.Linear(32, 32)
    hidden = [one] * 3 if same else [nn.Linear(32, 32) for _ in range(3)]
    return nn.Sequential(nn.Linear(64, 32), nn.Sequential(*hidden), nn.ReLU(), nn.Linear(32, 10))


def normed(momentum: float | None = 0.1) -> nn.Module:
    norm = nn.BatchNorm1d(32, momentum=momentum)
    return nn.Sequential(nn.Linear(64, 32), norm, nn.ReLU(), nn.Linear(32, 10))


def evaluate_now(*, evaluating: bool) -> Callable[[Run, int], None]:
    """Every 25 steps the script evaluates four batches."""

    def evaluate(run: Run, step: int) -> None:
        if step % 25:
            return
        run.model.train(not evaluating)
        with torch.no_grad():
            for rows in run.data[0][:128].split(32):
                run.model(rows)
        run.model.train()

    return evaluate


class Pair(nn.Module):
    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 4, bias=False), nn.Linear(4, 32, bias=False)
        nn.init.zeros_(self.b.weight)
        if both:
            nn.init.zeros_(self.a.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


class Adapted(nn.Module):
    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.base, self.adapter, self.head = nn.Linear(64, 32), Pair(both=both), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.base(x) + self.adapter(x)))
        return out


class Experts(nn.Module):
    """Six experts, of which a hard rule uses the first ``used``."""

    def __init__(self, used: int) -> None:
        super().__init__()
        self.used = used
        self.base, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.base(x))
        chosen = torch.arange(len(h)) % self.used
        parts = [self.experts[i](h) * (chosen == i)[:, None] for i in range(6)]
        out: Tensor = self.head(h + torch.stack(parts).sum(0))
        return out


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = digits()
    return x.bfloat16(), y


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.slug)
def test_the_fault_is_found_in_time(case: Case) -> None:
    torch.manual_seed(0)
    result = case.faulty().go()
    assert result.steps.get(case.slug, 10**6) <= case.within, result.steps
    finding = result.first(case.slug)
    assert case.layer is None or finding.layer == case.layer
    assert finding.observed
    assert finding.remedy
    assert finding.remedies
    assert 0 <= finding.since_step <= result.steps[case.slug] or finding.slug == "not_held"


def trained_first(run: Run) -> Run:
    opt = adam(run.model, 3e-3)
    for _ in range(30):
        opt.zero_grad()
        torch.autograd.backward(F.cross_entropy(run.model(run.data[0]), run.data[1]))
        opt.step()
    return run


@pytest.mark.parametrize(
    ("run", "slug"),
    [
        # Trained weights are left as they are on purpose.
        (lambda: trained_first(Run(optimizer=lambda m: in_groups(m, 0.0))), "group_without_rate"),
        # An eps as large as the gradients, with a rate that makes up for it.
        (
            lambda: Run(optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.5, eps=1.0)),
            "gradient_below_eps",
        ),
        (lambda: far_targets(30.0), "targets_far"),
    ],
    ids=["a trunk without a rate", "a large eps", "targets of thirty"],
)
def test_what_is_meant_is_not_told(run: Callable[[], Run], slug: str) -> None:
    torch.manual_seed(0)
    assert slug not in run().go().steps


# Some rules have the same twin; it runs once.
TWINS = {case.healthy: case for case in CASES}.values()


@pytest.mark.parametrize("case", TWINS, ids=lambda case: case.slug)
def test_the_twin_without_the_fault_has_no_alarm(case: Case) -> None:
    torch.manual_seed(0)
    assert case.healthy().go().alarms() == []


def test_an_activation_is_seen_wherever_python_puts_its_objects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The object of a node of the gradient's graph is freed at once, and the next has its place.
    def place(thing: object) -> int:
        return 0 if isinstance(thing, Node) else id(thing)

    monkeypatch.setattr(forward_probe, "id", place, raising=False)
    assert Run(linear(nn.ReLU), steps=10).go().alarms() == []


@pytest.mark.parametrize("evaluating", [True, False], ids=["eval mode", "training mode"])
def test_an_evaluation_that_switches_to_training_mode_is_found(evaluating: bool) -> None:
    torch.manual_seed(0)
    x, y = digits()

    def evaluate(model: nn.Module) -> float:
        model.train(not evaluating)
        loss = F.cross_entropy(model(x[:64]), y[:64]).item()
        model.train()  # usual at the end, and no fault
        return loss

    result = Run(perceptron(0.1), evaluate=evaluate, steps=220).go()
    assert ("evaluation_in_train_mode" in result.steps) is not evaluating
    assert not any(module._forward_pre_hooks for module in Run().model.modules())


def test_a_second_look_does_not_wait_for_a_long_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step is short, the plan of a run becomes rare, and one look opens no finding."""
    monkeypatch.setattr(
        "esper.diagnosis.plan.Plan.adapt", lambda plan, *_: setattr(plan, "period", 6400)
    )
    torch.manual_seed(0)
    run = Run(
        perceptron(),
        shuffled(),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
        steps=260,
    )
    assert run.go().steps["slow_convergence"] == 250


def test_a_run_whose_loss_jumps_is_looked_at_closely_although_its_looks_are_rare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("esper.sdk.diagnosing.CLOSELY_EVERY", 200 / 6400)
    monkeypatch.setattr(
        "esper.diagnosis.plan.Plan.adapt", lambda plan, *_: setattr(plan, "period", 6400)
    )

    def kill(run: Run, step: int) -> None:
        if step == 210:
            with torch.no_grad():
                run.model[3].bias.fill_(-30.0)

    torch.manual_seed(0)
    run = Run(perceptron(), optimizer=lambda m: adam(m, 3e-3), steps=260, before=kill)
    assert 210 < run.go().steps["dying_relu"] <= 260


def test_the_next_look_is_the_first_that_is_due() -> None:
    plan = Plan()
    plan.period = 6400
    for step in range(1, 420):
        if step == 201:
            plan.look_again(200)
        due = next(later for later in range(step + 1, 10**4) if plan.is_due(later))
        assert plan.next_due(step) == due


@pytest.mark.parametrize(
    ("step_seconds", "share"), [(1e-3, 0.01), (2e-3, 0.005), (20e-3, 0.0025), (1.0, 0.0025)]
)
def test_a_look_takes_its_share_of_a_step(step_seconds: float, share: float) -> None:
    plan = Plan()
    for seconds in (2.0, 0.03, 0.03):  # the first look at a GPU loads code
        plan.add(seconds)
    plan.adapt(500, step_seconds)
    assert 0.03 / plan.period <= share * step_seconds
    assert plan.period == 50 or 0.03 / (plan.period / 2) > share * step_seconds


@pytest.mark.parametrize("is_late", [False, True])
def test_all_of_a_look_is_counted(monkeypatch: pytest.MonkeyPatch, is_late: bool) -> None:
    """On a GPU what a look queues there takes longer than the rules, and is read a step later."""
    monkeypatch.setattr(HostTransfer, "is_late", is_late)
    now = [0.0]
    model = perceptron()
    recorder = Recorder(
        model, [], FailClosed(), cost_clock=lambda: now[0], step_clock=lambda: now[0]
    )
    taken = recorder._take

    def take(step: int) -> bool:
        now[0] += 0.03
        return taken(step)

    monkeypatch.setattr(recorder, "_take", take)
    for step in range(1, 52):
        now[0] += 0.001
        if recorder.on_step(step):
            recorder.spend(0.0)
    assert recorder.plan.period * 10e-6 >= 0.03


def test_a_step_that_waits_for_its_data_is_as_long_as_it_lasts() -> None:
    busy, passed = [0.0], [0.0]
    model = perceptron()
    recorder = Recorder(
        model, [], FailClosed(), cost_clock=lambda: busy[0], step_clock=lambda: passed[0]
    )
    for step in range(1, 52):
        busy[0], passed[0] = busy[0] + 0.001, passed[0] + 1.0
        if recorder.on_step(step):
            recorder.spend(0.03)
    assert recorder.plan.period == 50


def test_a_busy_machine_changes_no_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each step of 1 ms waits so long for a processor that other programs have."""

    def period(waits_s: float) -> int:
        passed, waited = 0.0, tmp_path / "schedstat"
        monkeypatch.setattr("esper.diagnosis.plan.SCHEDULING", waited)
        monkeypatch.setattr(
            "esper.diagnosis.plan.time", SimpleNamespace(perf_counter=lambda: passed)
        )
        recorder = Recorder(perceptron(), [], FailClosed(), cost_clock=lambda: 0.0)
        for step in range(1, 52):
            passed += 0.001 + waits_s
            waited.write_text(f"7 {round(1e9 * waits_s * step)} {step}\n")
            if recorder.on_step(step):
                recorder.spend(0.003)
        return recorder.plan.period

    assert period(0.02) == period(0.0) == 400


@pytest.mark.parametrize("said", [None, "", "7 a 1"])
def test_where_the_waits_for_a_processor_are_not_known_they_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None
) -> None:
    monkeypatch.setattr("esper.diagnosis.plan.SCHEDULING", tmp_path / "schedstat")
    if said is not None:
        (tmp_path / "schedstat").write_text(said)
    before = time.perf_counter()
    assert before <= undisturbed_time() <= time.perf_counter()


@pytest.mark.parametrize("offset", [math.inf, -math.inf, math.nan])
def test_no_rule_fails_where_each_loss_is_infinite(offset: float) -> None:
    run = clipped(1e-9)
    run.loss = lambda out, target: F.cross_entropy(out, target) + offset
    run.go()  # which asserts it


def test_data_that_is_not_finite_is_looked_for_in_the_next_step() -> None:
    """Step 23 is measured by no plan."""

    def spoil(run: Run, step: int) -> None:
        if step == 23:
            x, y = run.data
            run.data = (torch.full_like(x, float("nan")), y)

    torch.manual_seed(0)
    result = Run(before=spoil, steps=26).go()
    assert (result.steps["non_finite"], result.steps["abnormal_data"]) == (23, 24)
    assert "remove or replace" in result.first("non_finite").remedy
    assert "wrong_loss" not in result.steps


def negated_squares(out: Tensor, target: Tensor) -> Tensor:
    return -F.mse_loss(out.squeeze(1), target / 4.5 - 1)


def summed_squares(out: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(out.squeeze(1), target / 4.5 - 1, reduction="sum")


def is_odd(out: Tensor, target: Tensor, *, factor: float = 1.0) -> Tensor:
    odd = (target % 2).float()
    return factor * F.binary_cross_entropy_with_logits(out.squeeze(1), odd)


def against_a_row(out: Tensor, target: Tensor) -> Tensor:
    """[N, 1] against [N] makes [N, N]."""
    return (F.softplus(out) - out * (target < 3).float()).mean()


@pytest.mark.parametrize(
    ("loss", "outputs", "slug"),
    [
        (lambda y, t: F.cross_entropy(torch.softmax(y, 1), t), 10, "wrong_output_activation"),
        (lambda y, t: F.cross_entropy(2 * y, t), 10, None),
        (negated_squares, 1, "wrong_loss"),
        (summed_squares, 1, "loss_not_reduced"),
        (lambda y, t: -negated_squares(y, t), 1, None),
        (lambda y, t: is_odd(y, t, factor=-1.0), 1, "wrong_loss"),
        (lambda y, t: is_odd(y, t, factor=32.0), 1, "loss_not_reduced"),
        (is_odd, 1, None),
        (lambda y, t: -F.cross_entropy(y, t), 10, "wrong_loss"),
        (lambda y, t: -F.nll_loss(torch.softmax(y, 1), t), 10, "wrong_loss"),
        (lambda y, t: F.nll_loss(torch.softmax(y, 1), t), 10, "wrong_loss"),
        (lambda y, t: 2 - 2 * torch.softmax(y, 1).gather(1, t[:, None]).mean(), 10, None),
        (lambda y, t: F.nll_loss(torch.log_softmax(y, 0), t), 10, "softmax_over_batch"),
        (lambda y, t: F.cross_entropy((y @ y.T).T, torch.arange(len(y))), 10, None),
        (against_a_row, 1, "wrong_loss"),
        (lambda y, t: F.binary_cross_entropy_with_logits(y, torch.full_like(y, 0.9)), 1, None),
        (lambda y, t: F.mse_loss(y, torch.full_like(y, 0.9)), 1, None),
    ],
    ids=[
        "softmax outside the model", "scaled logits", "squares, minus sign", "sum of squares",
        "squares", "binary, minus sign", "binary, sum", "binary", "classes, minus sign",
        "probability", "probability, minus sign", "absolute error of probabilities",
        "softmax over the batch", "contrast", "binary against a row", "soft label of a GAN",
        "soft label of a least squares GAN",
    ],
)  # fmt: skip
def test_the_gradient_and_the_loss_show_what_the_loss_is(
    loss: Callable[[Tensor, Tensor], Tensor], outputs: int, slug: str | None
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs))
    result = Run(model, loss=loss, steps=2).go()
    assert list(result.steps) == ([slug] if slug else [])


def test_experts_may_be_sequences_of_layers() -> None:
    torch.manual_seed(0)
    model = Experts(used=4)
    model.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6))
    result = Run(model, steps=52).go()
    assert result.steps["dead_experts"] == 50
    assert result.first("dead_experts").layer == "experts.4"


@pytest.mark.parametrize(
    ("end", "lowest", "told"),
    [
        (nn.ReLU, -1.5, True),
        (nn.Tanh, -1.5, True),
        (nn.Sigmoid, -1.5, True),
        (nn.ReLU, 0.1, False),
        (nn.Softplus, -1.5, False),  # not known to the rule
        (nn.Identity, -1.5, False),
    ],
)
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss])
def test_targets_that_the_output_cannot_reach_are_told(
    end: type[nn.Module], lowest: float, told: bool, loss: Loss
) -> None:
    """They are read from the gradient of a mean squared error, whole numbers or not."""
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    y = x[:, :1] * 0.7
    y = y - y.min() + lowest
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), end())
    found = Run(model, (x, y), loss, steps=12).go()
    slugs = {f.slug for f in found.open}
    assert ("wrong_output_activation" in slugs) is (told and loss is F.mse_loss)
    if told and loss is F.mse_loss:
        assert "the targets are from -1." in found.first("wrong_output_activation").observed


@pytest.mark.parametrize(
    ("batches", "divided_by", "rate", "severity"),
    [
        (8, 1, 3.0, Severity.SERIOUS),
        (8, 1, 0.01, Severity.INFO),
        (8, 8, 3.0, None),
        (2, 1, 3.0, None),  # perhaps two parts of one loss
    ],
)
def test_batches_whose_gradients_are_added_undivided_are_told(
    batches: int, divided_by: int, rate: float, severity: Severity | None
) -> None:
    """Measured: a run that ended at guessing, and nothing was said."""
    torch.manual_seed(0)
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    found: list[Severity] = []
    with esper.attach(model, optimizer, mode="observe", server="", verbose=False) as session:
        for place, rows in enumerate(order[: 12 * batches * 16].split(16)):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            torch.autograd.backward(loss / divided_by)
            if (place + 1) % batches == 0:
                optimizer.step()
                optimizer.zero_grad()
                session.step(loss)
                own = (f for f in session.findings() if f.slug == "loss_not_reduced")
                found += [f.severity for f in own]
    assert (Severity.SERIOUS in found) is (severity is Severity.SERIOUS)
    assert bool(found) is (severity is not None)


@pytest.mark.parametrize(("first", "told"), [(1, False), (25, True)])
def test_a_rate_of_zero_for_an_epoch_is_told_while_it_lasts(first: int, told: bool) -> None:
    """A warm-up that counts epochs begins with a whole one at a rate of zero."""
    result = Run(schedule=lambda step: float(step >= first), steps=30).go()
    assert ("nothing_moves" in result.steps) is told
    assert not result.open


def test_gradients_clipped_to_nothing_are_told_once() -> None:
    found = clipped(1e-6).go().steps
    assert "clipped_to_nothing" in found
    assert "update_ratio_low" not in found


def test_a_warm_up_that_does_not_end_is_told_as_one() -> None:
    result = Run(schedule=lambda step: step / 1e7, steps=900).go()
    assert "warmup_steps" in result.first("update_ratio_low").remedy


class Tokens(nn.Module):
    """Logits of the next token at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(50, 16), nn.GRU(16, 16), nn.Linear(16, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.table(tokens))[0])
        return out


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("shift", "severity"), [(0, Severity.INFO), (1, None), (2, Severity.CAUTION)]
)
def test_targets_that_are_the_input_or_shifted_twice_are_told(
    shift: int, severity: Severity | None, axis: int
) -> None:
    """Measured: a model whose targets were its input ended at a held-out loss of 9.0."""
    torch.manual_seed(0)
    model = Tokens()
    optimizer = adam(model)
    with esper.attach(model, optimizer, mode="observe", server="", verbose=False) as session:
        tokens = torch.randint(50, (18, 18))
        seen, wanted = tokens.narrow(axis, 0, 16), tokens.narrow(axis, shift, 16)
        loss = F.cross_entropy(model(seen).flatten(0, 1), wanted.flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)
        found = {f.slug: f.severity for f in session.findings()}
    assert found.get("targets_shifted") is severity


def test_a_model_that_copies_its_input_at_once_is_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 50), nn.Linear(50, 50))
    tokens = torch.randint(50, (64, 16))
    result = Run(
        model, (tokens, tokens), loss=lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()),
        optimizer=lambda m: adam(m, 0.05), steps=40,
    ).go()  # fmt: skip
    assert result.first("targets_shifted").severity is Severity.CAUTION


class Recurrent(nn.Module):
    """Reads an image row by row, with gates that begin open or shut."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)
        nn.init.constant_(self.lstm.bias_ih_l0, bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x.view(-1, 8, 8))[0][:, -1])
        return out


class Attending(nn.Module):
    """Logits of the next token, by one layer of attention."""

    def __init__(self, mask: str, axis: int = -1, dropout: float = 0.0) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(50, 16), nn.Embedding(16, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(16, 50)
        ones = torch.ones(16, 16, dtype=torch.bool)
        self.hidden = {"causal": ones.triu(1), "none": ~ones, "inverted": ones.tril()}[mask]
        self.axis = axis

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.table(tokens) + self.places(torch.arange(16)))
        scores = (self.query(x) @ self.key(x).mT / 4).masked_fill(self.hidden, -1e9)
        out: Tensor = self.head(x + scores.softmax(self.axis) @ self.value(x))
        return out.flatten(0, 1)


@pytest.mark.parametrize(
    ("mask", "options", "steps", "told"),
    [
        ("causal", {}, 20, False),
        ("causal", {"dropout": 0.1}, 20, False),
        ("none", {}, 1, True),
        ("inverted", {}, 1, True),
        ("causal", {"axis": -2}, 1, True),
    ],
)
def test_a_model_that_sees_later_tokens_is_told(
    mask: str, options: dict[str, Any], steps: int, told: bool
) -> None:
    torch.manual_seed(0)
    model = Attending(mask, **options)
    optimizer = adam(model, 0.02)
    with esper.attach(model, optimizer, mode="observe", server="", verbose=False) as session:
        for _ in range(steps):
            tokens = torch.randint(8, (64, 17)) + 40
            loss = F.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten())
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            session.step(loss)
        found = {f.slug: f.severity for f in session.findings()}
    assert found.get("sees_ahead") is (Severity.SERIOUS if told else None)


class Beside(Attending):
    """Reads a second argument, which has a value for each token as well."""

    def forward(self, tokens: Tensor, beside: Tensor) -> Tensor:
        return super().forward(tokens) + self.head(self.table(beside)[:, :1]).expand(
            -1, 16, -1
        ).flatten(0, 1)


@pytest.mark.parametrize(
    ("beside", "mask", "told"),
    [
        ("source", "causal", False),
        ("places", "causal", False),
        ("alike", "none", True),
        ("targets", "none", True),
        ("copy", "causal", False),
    ],
)
def test_what_a_model_reads_beside_its_tokens_is_no_later_token(
    beside: str, mask: str, told: bool
) -> None:
    """A decoder knows the source from the encoder, and packed texts begin at other places."""
    torch.manual_seed(0)
    model = Beside(mask)
    optimizer = adam(model, 0.02)
    tokens = torch.randint(8, (64, 17)) + 40
    places = torch.arange(16).expand(64, 16)
    others = {
        "source": torch.randint(50, (64, 16)),
        "places": places + torch.randint(9, (64, 1)),
        "alike": places,
        "targets": tokens[:, 1:],
        "copy": tokens[:, :-1].roll(1, 1),
    }
    wanted = tokens[:, :-1] if beside == "copy" else tokens[:, 1:]
    with esper.attach(model, optimizer, mode="observe", server="", verbose=False) as session:
        loss = F.cross_entropy(model(tokens[:, :-1], others[beside]), wanted.flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)
        found = {f.slug for f in session.findings()}
    assert ("sees_ahead" in found) is told
    assert "targets_shifted" not in found


@pytest.mark.parametrize(
    ("read", "told"),
    [
        ("transposed", False),
        ("rows", False),
        ("viewed", True),
        ("unsorted rows", True),
        ("softmax over height", True),
        ("softmax over classes", False),
        ("double softmax", False),
    ],
)
def test_a_loss_that_reads_its_classes_from_another_axis_is_told(read: str, told: bool) -> None:
    torch.manual_seed(0)
    axis = {"softmax over height": 2, "softmax over classes": 1, "double softmax": 1}.get(read)
    parts = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)]
    model = nn.Sequential(*parts, *([nn.Softmax(axis)] if axis else []))
    x = torch.rand(8, 1, 6, 6)
    target = (3 * x[:, 0]).long()

    def loss(y: Tensor) -> Tensor:
        if read == "viewed":
            return F.cross_entropy(y.reshape(8, 6, 3, 6), (6 * x[:, 0, :3]).long())
        if read == "unsorted rows":
            return F.cross_entropy(y.reshape(-1, 3), target.flatten())
        if read == "rows":
            return F.cross_entropy(y.permute(0, 2, 3, 1).reshape(-1, 3), target.flatten())
        if axis and read != "double softmax":
            return F.nll_loss((y + 1e-8).log(), target)
        return F.cross_entropy(y, target)

    optimizer = adam(model)
    with esper.attach(model, optimizer, mode="observe", server="", verbose=False) as session:
        made = loss(model(x))
        torch.autograd.backward(made)
        optimizer.step()
        session.step(made)
        found = {f.slug: f.severity for f in session.findings()}
    assert found.get("classes_on_other_axis") is (Severity.SERIOUS if told else None)


class Encoding(nn.Module):
    """A class for each padded sequence, by one layer of attention."""

    def __init__(self, hides: str) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head, self.hides = nn.Linear(16, 2), hides

    def forward(self, tokens: Tensor) -> Tensor:
        x, padding = self.table(tokens), tokens == 0
        hidden = {"padding": padding, "tokens": ~padding, "nothing": None}[self.hides]
        y = self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        out: Tensor = self.head(y.mean(1))
        return out


@pytest.mark.parametrize("hides", ["padding", "tokens", "nothing"])
def test_a_mask_that_hides_the_tokens_and_not_the_padding_is_told(hides: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(1, 8, (16, 12))
    tokens[torch.arange(12) >= torch.randint(2, 11, (16, 1))] = 0
    labels = (tokens == 3).any(1).long()
    found = Run(Encoding(hides), (tokens, labels), steps=1, batch=16).go().steps  # type: ignore[arg-type]
    assert ("mask_inverted" in found) is (hides == "tokens")


@pytest.mark.parametrize(
    ("frozen", "told"), [("at birth", True), ("trained", False), ("with all", False), ("", False)]
)
def test_a_batch_norm_that_is_frozen_without_statistics_is_told(frozen: str, told: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    if frozen == "trained":
        model(digits()[0])

    def freeze(run: Run, step: int) -> None:
        (model if frozen == "with all" else model[1]).train(not frozen)

    for scale, severity in ((1.0, Severity.INFO), (1e3, Severity.CAUTION)):
        result = Run(model, digits(scale), before=freeze, steps=1).go()
        own = [f.severity for f in result.open if f.slug == "norm_without_statistics"]
        assert own == ([severity] if told else [])


@pytest.mark.parametrize("knows", [False, True])
def test_what_one_token_cannot_tell_shows_a_leak_with_dropout_too(knows: bool) -> None:
    """A model of one token that has memorised its batch reaches the bound, and is not below it."""
    tokens = torch.randint(4, (64, 9), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 3
    targets = F.one_hot(tokens[:, 1:], 4).double()
    known = targets if knows else targets.mean(0, keepdim=True).expand_as(targets)
    outputs = known.clamp_min(1e-3).log()
    first = FirstPlaces(tokens[:, :-1], outputs, [], 1, random=True, precision=torch.float32)
    seen = ModelPass(1, ahead=ahead_of(first.read(outputs.softmax(-1) - targets)))
    found = SeesAhead().check(Observation(passes=(seen,)), Memory())
    assert (found is not None) is knows


@pytest.mark.parametrize(
    ("batches", "cleared", "told"),
    [(4, "each", True), (4, "update", False), (1, "each", False), (4, "summed by hand", False)],
)
def test_accumulated_gradients_that_are_cleared_are_told(
    batches: int, cleared: str, told: bool
) -> None:
    """Measured: with 8 batches digits at 0.31, with their sum at 0.93."""
    torch.manual_seed(0)
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = digits()
    with esper.attach(model, optimizer, mode="observe", server="", verbose=False) as session:
        for update in range(10):
            if cleared == "update":
                optimizer.zero_grad()
            total = [torch.zeros_like(p) for p in model.parameters()]
            for place in range(batches):
                if cleared != "update":
                    optimizer.zero_grad()
                rows = slice(16 * (update * batches + place), 16 * (update * batches + place + 1))
                loss = F.cross_entropy(model(x[rows]), y[rows]) / batches
                torch.autograd.backward(loss)
                for own, p in zip(total, model.parameters(), strict=True):
                    own += p.grad
            if cleared == "summed by hand":  # clipped one by one, as for privacy
                for own, p in zip(total, model.parameters(), strict=True):
                    p.grad = own
            optimizer.step()
            session.step(loss * batches)
        slugs = {f.slug for f in session.findings()}
    assert ("accumulation_cleared" in slugs) is told
    assert "accumulation_miscounted" not in slugs


@pytest.mark.parametrize(
    ("share", "answered", "severity"),
    [
        (62 / 64, 1.0, Severity.CAUTION),
        (62 / 64, 63 / 64, Severity.INFO),
        (1.0, 1.0, Severity.INFO),  # no row of another class was seen
        (0.8, 1.0, None),
    ],
)
def test_a_class_that_is_nearly_alone_and_the_only_answer_is_told(
    share: float, answered: float, severity: Severity | None
) -> None:
    passes = [
        ModelPass(
            step, output_shape=(64, 2), loss_kind=LossKind.CROSS_ENTROPY, loss_scale=1.0,
            target_class=0, target_share=share, answered_share=answered,
        )
        for step in (1, 50, 200, 400, 600)
    ]  # fmt: skip
    found = ImbalancedClasses().check(Observation(step=600, passes=passes), Memory())
    told = None if found is None else found.severity or ImbalancedClasses.severity
    assert told is severity


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("inverted", [False, True])
def test_weights_that_take_a_rare_class_out_of_the_loss_are_told(
    outputs: int, inverted: bool
) -> None:
    """Measured: with a tenth of the rows in class 1 and these weights, no row of it is found."""
    torch.manual_seed(0)
    x, y = digits()
    rare = (y == 8).long()
    counts = torch.bincount(rare).double()
    weights = (counts if inverted else 1 / counts) / counts.sum()

    def loss(out: Tensor, target: Tensor) -> Tensor:
        if outputs == 2:
            return F.cross_entropy(out, target, weight=weights.float())
        return F.binary_cross_entropy_with_logits(
            out[:, 0], target.float(), pos_weight=weights[1] / weights[0]
        )

    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, outputs))
    result = Run(model, (x, rare), loss, batch=64, steps=31).go()
    found = {f.slug: f.remedy for f in result.open}
    assert ("imbalanced_classes" in found) is inverted
    assert not inverted or "pos_weight" in found["imbalanced_classes"]


def test_a_rare_class_that_is_answered_is_a_note() -> None:
    torch.manual_seed(0)
    x, _ = digits()
    y = (x[:, 20] > x[:, 20].quantile(0.97)).long()
    result = Run(perceptron(), (x, y), optimizer=lambda m: adam(m, 1e-2), steps=205).go()
    assert result.alarms() == []


@pytest.mark.parametrize(
    ("mean", "deviation", "told"), [(128.0, 64.0, True), (0.3, 0.4, False)], ids=["wrong", "right"]
)
def test_inputs_with_the_statistics_of_other_data_are_told(
    mean: float, deviation: float, told: bool
) -> None:
    """Those of pixels from 0 to 255, of images from 0 to 1."""
    torch.manual_seed(0)
    x, y = digits()
    result = Run(data=((x - mean) / deviation, y), optimizer=sgd, steps=41).go()
    assert ("abnormal_data" in result.steps) is told
    if told:
        assert "own mean" in result.first("abnormal_data").remedy


def test_a_flow_whose_loss_falls_below_zero_is_no_wrong_loss() -> None:
    """Its gradient at the output is that of a square, and the determinant is subtracted."""
    torch.manual_seed(0)
    x = 0.1 * torch.randn(400, 2)
    flow = nn.Linear(2, 2)

    def loss(z: Tensor, _: Tensor) -> Tensor:
        return 0.5 * z.square().sum(1).mean() - torch.linalg.slogdet(flow.weight)[1]

    result = Run(flow, (x, x), loss, lambda m: adam(m, 0.1), steps=52).go()
    assert min(result.losses) < 0
    assert "wrong_loss" not in result.steps


def test_inputs_of_zeros_alone_are_told() -> None:
    torch.manual_seed(0)
    x, y = digits()
    result = Run(data=(torch.zeros_like(x), y), steps=52).go()
    assert "exactly zero" in result.first("abnormal_data").observed


class Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.log_var = nn.Linear(64, 32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.relu(self.body(x))
        mean, log_var = self.mean(h), self.log_var(h)
        return self.decoder(mean + (log_var / 2).exp() * torch.randn_like(mean)), mean, log_var


@pytest.fixture
def looks_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a net whose steps are long: the forward pass is read at each 200th one."""
    monkeypatch.setattr(Plan, "adapt", lambda self, step, step_seconds: None)


@pytest.mark.usefixtures("looks_cost_nothing")
@pytest.mark.parametrize(("weight", "told"), [(1.0, True), (1e-3, False)])
def test_an_encoder_that_says_nothing_is_told(weight: float, told: bool) -> None:
    torch.manual_seed(0)
    x, _ = digits()

    def loss(out: tuple[Tensor, Tensor, Tensor], wanted: Tensor) -> Tensor:
        image, mean, log_var = out
        divergence = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean()
        return F.mse_loss(image, wanted) + weight * divergence

    result = Run(Variational(), (x, x), loss, lambda m: adam(m, 1e-2), steps=205).go()  # type: ignore[arg-type]
    assert ("posterior_collapse" in result.steps) is told
    if told:
        assert result.first("posterior_collapse").layer == "mean"


@pytest.mark.usefixtures("looks_cost_nothing")
@pytest.mark.parametrize(("factor", "told"), [(10.0, True), (1e-4, False)])
def test_a_penalty_that_leaves_nothing_to_learn_is_told(factor: float, told: bool) -> None:
    torch.manual_seed(0)
    model = perceptron()

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target) + factor * sum(
            p.square().sum() for p in model.parameters()
        )

    result = Run(model, loss=loss, steps=205).go()
    assert ("penalty_outweighs" in result.steps) is told
    assert "bad_initialisation" not in result.steps


@pytest.mark.parametrize("trained", [False, True])
def test_a_table_that_is_frozen_with_its_first_values_is_a_note(trained: bool) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(200, 16)
    with torch.no_grad():
        table.weight.mul_(0.6 if trained else 1.0)
    table.requires_grad_(requires_grad=False)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(64, 10))
    tokens = torch.randint(200, (400, 4))
    result = Run(model, (tokens, tokens.sum(1) % 10), steps=2).go()
    assert ("frozen_at_random" in result.steps) is not trained


def test_large_inputs_of_a_recurrent_layer_are_told() -> None:
    """What it returns is between -1 and 1, and says nothing of the size of its input."""
    torch.manual_seed(0)
    x, y = digits(255.0)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x.view(-1, 8, 8))[0][:, -1])
            return out

    assert Run(Recurrent(), (x, y), steps=2).go().steps["abnormal_data"] == 1


@pytest.mark.parametrize(("trained", "told"), [(False, True), (True, False)])
def test_a_trained_model_may_be_made_to_forget(trained: bool, told: bool) -> None:
    """Gradient ascent on what it shall not know, from a loss near zero."""
    torch.manual_seed(0)
    model, (x, y) = perceptron(), digits()
    if trained:
        Run(model, (x, y), optimizer=lambda m: adam(m, 1e-2), steps=60).go()
    gone = Run(model, (x, y), lambda out, t: -F.cross_entropy(out, t), lambda m: adam(m, 1e-5))
    gone.steps = 2
    result = gone.go()
    assert ("wrong_loss" in result.steps) is told
    if told:
        assert "with a minus sign" in result.first("wrong_loss").observed


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_divergence_with_the_wrong_sign_is_a_loss_without_end(sign: float) -> None:
    torch.manual_seed(0)
    model, (x, _) = Variational(), digits()

    def loss(out: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        seen, mean, spread = out
        divergence = 0.5 * (mean**2 + spread.exp() - spread - 1).sum(1).mean()
        return F.mse_loss(seen, target) + sign * 0.01 * divergence

    found = Run(model, (x, x), loss, lambda m: adam(m, 5e-3), steps=130).go().steps  # type: ignore[arg-type]
    assert ("wrong_loss" in found) is (sign < 0)


@pytest.mark.parametrize("units", [1, 8])
def test_a_layer_of_one_unit_is_told_by_its_name(units: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, units), nn.ReLU(), nn.Linear(units, 32),
        nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    result = Run(model, steps=130).go()
    told = [f.layer for f in result.open if f.slug == "single_unit"]
    assert told == (["2"] if units == 1 else [])
    assert units > 1 or result.first("single_unit").severity is Severity.CAUTION


def test_a_gate_of_one_unit_beside_the_path_is_no_layer_of_one_unit() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sequential(nn.Linear(32, 1), nn.ReLU(), nn.Linear(1, 32), nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(x)

    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), Gate(), nn.Linear(32, 10))
    assert "single_unit" not in Run(model, steps=12).go().steps


@pytest.mark.parametrize(("first", "severity"), [(2.0, None), (2.7, Severity.INFO)])
def test_a_learned_weight_of_each_task_may_take_the_loss_below_zero(
    first: float, severity: Severity | None
) -> None:
    """The logarithm of each weight is added, which may be any number."""
    seen = ModelPass(
        1,
        output_shape=(32, 10),
        loss_kind=LossKind.CROSS_ENTROPY,
        loss_scale=1.0,
        cross_entropy=2.0,
    )
    losses = np.array([first, 1.0, -0.5])
    observation = Observation(
        step=3, loss_steps=np.arange(1, 4), losses=losses, passes=(seen,), gradients=(),
    )  # fmt: skip
    found = WrongLoss().check(observation, Memory())
    assert found is not None
    assert found.severity is severity
