"""Companions: new weights trained beside an optimizer whose groups and state stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from esper.grafting import accompany, audit, companions_of
from esper.grafting.companions.companion import Companion
from esper.grafting.companions.making import grows_with_gradient, make_like
from tests.esper.tiny_models import make_training


def group_of(companion: Companion) -> dict[str, Any]:
    (group,) = companion.optimizer.param_groups
    return group


def test_new_weights_warm_up_without_decay_whatever_the_scheduler_does() -> None:
    host, new = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD(host.parameters(), lr=1.0, weight_decay=0.5)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 if step else 1.0)
    accompany(optimizer, [new], layer="a", host=host, warmup_steps=4)
    moves = []
    for _ in range(6):
        before = new.item()
        new.grad = None
        new.sum().backward()
        optimizer.step()
        scheduler.step()
        moves.append(before - new.item())
    warm = [1.0 * 1 / 4, 0.1 * 2 / 4, 0.1 * 3 / 4, 0.1 * 4 / 4]
    assert moves[:4] == pytest.approx(warm)
    start_of_decay = 1.0 - sum(warm)
    assert moves[4] == pytest.approx(0.1 * (1 + 0.5 * start_of_decay))


def test_the_warm_up_goes_on_after_an_optimizer_step_that_raised() -> None:
    host, new = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD(host.parameters(), lr=1.0)
    accompany(optimizer, [new], layer="a", host=host, warmup_steps=2)

    def closure() -> float:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        optimizer.step(closure)
    new.sum().backward()
    optimizer.step()
    assert new.item() == pytest.approx(0.5)


def test_new_adam_state_starts_at_step_one_and_the_hosts_goes_on() -> None:
    training = make_training("none")
    training.run(5)
    new = nn.Parameter(torch.zeros(3))
    companion = accompany(training.optimizer, [new], layer="head", host=training.model.head)
    new.sum().backward()
    training.optimizer.step()
    assert companion.optimizer.state[new]["step"] == 1
    assert training.optimizer.state[training.model.head.weight]["step"] == 6
    assert new not in training.optimizer.state


def test_the_layers_own_group_is_the_model_for_the_new_one() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(
        [
            {"params": first.parameters(), "lr": 1e-3, "weight_decay": 0.1},
            {"params": second.parameters(), "lr": 1e-4, "betas": (0.8, 0.9)},
        ]
    )
    companion = accompany(optimizer, [nn.Parameter(torch.ones(2))], layer="b", host=second)
    assert group_of(companion)["lr"] == 1e-4
    assert group_of(companion)["betas"] == (0.8, 0.9)
    optimizer.load_state_dict(optimizer.state_dict())  # replaces the groups
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    optimizer.step()
    assert group_of(companion)["betas"] == (0.5, 0.6)


def test_a_wrapped_optimizer_is_reached() -> None:
    class Accelerated:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    host = nn.Linear(2, 2)
    wrapped = Accelerated(torch.optim.AdamW(host.parameters()))
    companion = accompany(wrapped, [nn.Parameter(torch.ones(2))], layer="a", host=host)
    assert companions_of(wrapped) == companions_of(wrapped.optimizer) == (companion,)
    assert audit(nn.Linear(1, 1), [wrapped])


def test_an_optimizer_that_has_its_groups_alone_is_completed() -> None:
    class Bare(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            self.param_groups = [{"params": list(params), "lr": 0.1}]
            self.state = {}  # type: ignore[assignment]

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter -= 0.1 * parameter.grad

    host, new = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    optimizer = Bare(host.parameters())
    accompany(optimizer, [new], layer="a", host=host)
    torch.autograd.backward((host(torch.ones(1, 2)) * new).sum())
    optimizer.step()
    assert not torch.equal(new, torch.ones(2))


def test_nothing_stays_on_the_optimizer_after_the_last_companion() -> None:
    host = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(host.parameters())
    new = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    companions = [accompany(optimizer, [parameter], layer="a", host=host) for parameter in new]
    for companion in companions:
        companion.leave()
        companion.leave()
    assert companions_of(optimizer) == ()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(parameter._backward_hooks for parameter in new)


def test_a_companion_that_fails_stops_alone_and_is_a_finding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    companion = accompany(optimizer, list(model[1].parameters()), layer="1", host=model[0])
    monkeypatch.setattr(companion.optimizer, "step", lambda: 1 / 0)
    for _ in range(2):
        before = model[0].weight.detach().clone()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert not torch.equal(model[0].weight, before)
    (finding,) = audit(model, [optimizer])
    assert finding.severity == "serious"
    assert "the graft learns no more" in finding.observed
    assert "ZeroDivisionError" in finding.observed


class RefusesTheFirstStep(torch.optim.SGD):
    """As an optimizer whose kernels exist for a GPU alone does on a CPU."""

    refused = False

    def step(self, closure: Any = None) -> Any:
        if not RefusesTheFirstStep.refused:
            RefusesTheFirstStep.refused = True
            raise RuntimeError("no kernel for this device")
        return super().step(closure)


def test_an_optimizer_that_cannot_be_tried_on_the_cpu_is_tried_where_the_weights_are() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    host = RefusesTheFirstStep([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert grows_with_gradient(make_like(host, host.param_groups[0], [weight]), [weight])
    assert RefusesTheFirstStep.refused
