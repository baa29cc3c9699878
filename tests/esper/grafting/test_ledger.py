"""The optimizer's groups: new weights in a group of their own, with schedulers and warm-up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from esper.exceptions import GraftError
from esper.grafting import add_group, audit
from tests.esper.tiny_models import make_training

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=50),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=3),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 4]),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[1e-5]),
}


def advance(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_drives_the_new_group_like_the_old_one(kind: str) -> None:
    layer, new = nn.Linear(3, 3), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scheduler = SCHEDULERS[kind](optimizer)
    advance(scheduler, optimizer)
    add_group(optimizer, [new], layer="a", host=layer, schedulers=[scheduler])
    for _ in range(6):
        advance(scheduler, optimizer)
        old, young = optimizer.param_groups
        assert young["lr"] == old["lr"]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_removed_group_leaves_no_trace_in_the_scheduler(kind: str) -> None:
    def rates(with_graft: bool) -> list[float]:
        layer = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scheduler = SCHEDULERS[kind](optimizer)
        if with_graft:
            receipt = add_group(
                optimizer, [nn.Parameter(torch.zeros(3))], layer="a", schedulers=[scheduler]
            )
            receipt.remove()
            receipt.remove()
        seen = []
        for _ in range(6):
            advance(scheduler, optimizer)
            seen.append([group["lr"] for group in optimizer.param_groups])
        return seen

    assert rates(with_graft=True) == rates(with_graft=False)


def test_new_weights_warm_up_without_decay_whatever_the_scheduler_does() -> None:
    host, new = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD(host.parameters(), lr=1.0, weight_decay=0.5)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 if step else 1.0)
    add_group(optimizer, [new], layer="a", host=host, schedulers=[scheduler], warmup_steps=4)
    moves = []
    for _ in range(6):
        before = new.item()
        new.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        moves.append(before - new.item())
    warm = [1.0 * 1 / 4, 0.1 * 2 / 4, 0.1 * 3 / 4, 0.1 * 4 / 4]
    assert moves[:4] == pytest.approx(warm)
    start_of_decay = 1.0 - sum(warm)
    assert moves[4] == pytest.approx(0.1 * (1 + 0.5 * start_of_decay))
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"]


def test_the_warm_up_goes_on_after_an_optimizer_step_that_raised() -> None:
    host, new = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD(host.parameters(), lr=1.0)
    add_group(optimizer, [new], layer="a", host=host, warmup_steps=2)

    def closure() -> float:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        optimizer.step(closure)
    new.grad = torch.ones(1)
    optimizer.step()
    assert new.item() == pytest.approx(0.5)


def test_new_adam_state_starts_at_step_one_and_the_hosts_goes_on() -> None:
    training = make_training("none")
    training.run(5)
    new = nn.Parameter(torch.zeros(3))
    add_group(training.optimizer, [new], layer="head", host=training.model.head)
    assert new not in training.optimizer.state
    new.grad = torch.ones(3)
    training.optimizer.step()
    assert training.optimizer.state[new]["step"] == 1
    assert training.optimizer.state[training.model.head.weight]["step"] == 6


@pytest.mark.parametrize(
    "make",
    [torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adam, torch.optim.NAdam],
    ids=lambda cls: cls.__name__,
)
def test_other_optimizers_train_the_new_weights(make: type[torch.optim.Optimizer]) -> None:
    host, new = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    optimizer = make(host.parameters(), lr=0.1)
    receipt = add_group(optimizer, [new], layer="a", host=host)
    new.grad = torch.ones(2)
    optimizer.step()
    assert (new < 1).all()
    receipt.remove()
    assert new not in optimizer.state


def test_an_optimizer_that_cannot_take_new_weights_is_left_as_it_was() -> None:
    host = nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(host.parameters())
    with pytest.raises(GraftError, match="LBFGS"):
        add_group(optimizer, [nn.Parameter(torch.ones(2))], layer="a", host=host)
    assert len(optimizer.param_groups) == 1


def test_the_layers_own_group_is_the_model_for_the_new_one() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(
        [
            {"params": first.parameters(), "lr": 1e-3, "weight_decay": 0.1},
            {"params": second.parameters(), "lr": 1e-4, "betas": (0.8, 0.9)},
        ]
    )
    receipt = add_group(optimizer, [nn.Parameter(torch.ones(2))], layer="b", host=second)
    assert receipt.group["lr"] == 1e-4
    assert receipt.group["betas"] == (0.8, 0.9)


def test_a_wrapped_optimizer_is_reached() -> None:
    class Accelerated:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    host = nn.Linear(2, 2)
    wrapped = Accelerated(torch.optim.AdamW(host.parameters()))
    add_group(wrapped, [nn.Parameter(torch.ones(2))], layer="a", host=host)
    assert len(wrapped.optimizer.param_groups) == 2
    assert audit(nn.Linear(1, 1), [wrapped])


def test_a_healthy_run_has_no_findings() -> None:
    training = make_training()
    training.run(2)
    assert audit(training.model, [training.optimizer]) == []
    assert audit(training.model, []) == []


def test_the_audit_names_what_is_wrong_and_what_to_do() -> None:
    training = make_training("none")
    training.run(1)
    model, optimizer = training.model, training.optimizer
    group = optimizer.param_groups[0]
    lost = model.blocks[0].wide.weight
    group["params"] = [p for p in group["params"] if p is not lost]
    model.blocks[1].narrow.bias.requires_grad_(False)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    group["params"].append(model.head.weight)
    findings = {(f.layer, f.observed): f for f in audit(model, [optimizer])}
    observed = {key: finding.severity for key, finding in findings.items()}
    assert observed == {
        (
            "blocks.0.wide",
            "weight: trainable, but in no optimizer: it will never change",
        ): "serious",
        ("blocks.1.narrow", "bias: frozen, after an optimizer has trained it"): "caution",
        ("embed", "weight: held 2 times: it is updated more than once a step"): "serious",
        ("", "1 tensors held by an optimizer are not in the model"): "caution",
        ("", "1 entries of optimizer state belong to no group"): "caution",
    }
    assert all(f.remedy and f.rule == "optimizer_ledger" for f in findings.values())


def test_what_is_frozen_from_the_start_is_the_users_choice() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert audit(model, [optimizer]) == []


def test_one_problem_of_many_tensors_is_one_finding() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    (finding,) = audit(model, [torch.optim.SGD(model[0].parameters(), lr=0.1)])
    assert finding.layer == ""
    assert finding.observed.startswith("18 tensors, the first is 1.weight: trainable, but in no")
