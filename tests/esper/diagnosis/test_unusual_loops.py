"""Loops that look odd and are right raise no alarm."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.contracts import Severity
from esper.diagnosis.gradient_probe import GradientProbe
from esper.health.transfers import HostTransfer
from tests.esper.diagnosis.small_runs import digits, perceptron

STEPS = 120
Loop = Callable[[], "esper.Session"]


def rows(step: int) -> tuple[Tensor, Tensor]:
    x, y = digits()
    places = torch.randint(0, len(x), (32,), generator=torch.Generator().manual_seed(step))
    return x[places], y[places]


class Pair(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
        self.judge = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))


def adversarial(*, generator_first: bool) -> esper.Session:
    pair = Pair()
    makes = torch.optim.Adam(pair.make.parameters(), 1e-3)
    judges = torch.optim.Adam(pair.judge.parameters(), 1e-3)
    session = esper.attach(pair, [makes, judges])

    def make(step: int) -> None:
        fake = pair.judge(pair.make(torch.randn(32, 8)))
        makes.zero_grad()
        F.softplus(-fake).mean().backward()
        makes.step()

    def judge(step: int) -> Tensor:
        fake, (real, _) = pair.make(torch.randn(32, 8)).detach(), rows(step)
        loss = F.softplus(-pair.judge(real)).mean() + F.softplus(pair.judge(fake)).mean()
        judges.zero_grad()
        loss.backward()
        judges.step()
        return loss

    for step in range(STEPS):
        if generator_first:
            make(step)
            loss = judge(step)
        else:
            loss = judge(step)
            make(step)
        session.step(loss)
    return session


def accumulated() -> esper.Session:
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    session = esper.attach(model, optimizer)
    for step in range(STEPS):
        for part in range(4):
            x, y = rows(4 * step + part)
            loss = F.cross_entropy(model(x), y) / 4
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step(loss * 4)
    return session


def two_losses() -> esper.Session:
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    session = esper.attach(model, optimizer)
    for step in range(STEPS):
        x, y = rows(step)
        optimizer.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        loss.backward(retain_graph=True)
        (1e-3 * out.square().mean()).backward()
        optimizer.step()
        session.step(loss)
    return session


def gradients_by_hand() -> esper.Session:
    """``autograd.grad`` runs no hook that accumulates."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = esper.attach(model, optimizer)
    parameters = list(model.parameters())
    for step in range(STEPS):
        x, y = rows(step)
        loss = F.cross_entropy(model(x), y)
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        session.step(loss)
    return session


def closure() -> esper.Session:
    model = perceptron()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=3)
    session = esper.attach(model, optimizer)
    for step in range(STEPS // 4):
        x, y = rows(step)

        def once(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        session.step(optimizer.step(once))
    return session


class Distilled(nn.Module):
    """A student, and a teacher that follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = perceptron()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)


def with_a_teacher() -> esper.Session:
    both = Distilled()
    optimizer = torch.optim.Adam(both.student.parameters(), 1e-3)
    session = esper.attach(both, optimizer)
    for step in range(STEPS):
        x, y = rows(step)
        with torch.no_grad():
            target = both.teacher(x)
        out = both.student(x)
        loss = F.cross_entropy(out, y) + 0.1 * F.mse_loss(out, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(both.teacher.parameters(), both.student.parameters(), strict=True):
                old.lerp_(new, 0.05)
        session.step(loss)
    return session


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> esper.Session:
    session = esper.attach(model, optimizer)
    for step in range(STEPS):
        x, y = rows(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step(loss)
    return session


def head_only() -> esper.Session:
    """The body was trained before, and is frozen on purpose."""
    model = perceptron()
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    optimizer = torch.optim.Adam(model[5].parameters(), 1e-2)
    return plain_loop(model, optimizer)


class KeepsStatistics(nn.Sequential):
    """As detectors and fine-tunings do: ``train()`` leaves the batch norms in evaluation mode."""

    def train(self, mode: bool = True) -> KeepsStatistics:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


def statistics_kept() -> esper.Session:
    model = KeepsStatistics(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-3)
    return plain_loop(model, optimizer)


class WithTarget(nn.Module):
    """As a deep Q-network whose agent is one module: the target starts as a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = perceptron(), perceptron()
        self.target.load_state_dict(self.online.state_dict())


def with_a_target() -> esper.Session:
    agent = WithTarget()
    optimizer = torch.optim.Adam(agent.online.parameters(), 1e-3)
    session = esper.attach(agent, optimizer)
    for step in range(STEPS):
        x, _ = rows(step)
        with torch.no_grad():
            best = agent.target(x).max(1).values
        loss = F.smooth_l1_loss(agent.online(x)[:, 0], 0.9 * best)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            agent.target.load_state_dict(agent.online.state_dict())
        session.step(loss)
    return session


def evaluated_between() -> esper.Session:
    model = perceptron(0.2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session = esper.attach(model, optimizer)
    for step in range(STEPS):
        model.train()
        x, y = rows(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            model.eval()
            with torch.no_grad():
                session.report(eval_loss=F.cross_entropy(model(digits()[0]), digits()[1]).item())
        session.step(loss)
    return session


def policy_gradient() -> esper.Session:
    """A loss without a floor or a trend, of either sign."""
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    session = esper.attach(model, optimizer)
    for _ in range(STEPS):
        state = torch.randn(64, 4)
        chosen = torch.distributions.Categorical(logits=model(state))
        action = chosen.sample()
        reward = (action == state[:, :3].argmax(1)).float() - 0.33
        loss = -(chosen.log_prob(action) * reward).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step(loss)
    return session


LOOPS: dict[str, Loop] = {
    "discriminator first": lambda: adversarial(generator_first=False),
    "generator first": lambda: adversarial(generator_first=True),
    "accumulation": accumulated,
    "two backward passes": two_losses,
    "autograd.grad": gradients_by_hand,
    "closure": closure,
    "teacher": with_a_teacher,
    "frozen body": head_only,
    "statistics kept": statistics_kept,
    "target": with_a_target,
    "evaluation between steps": evaluated_between,
    "policy gradient": policy_gradient,
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_loop_that_is_right_has_no_alarm(loop: Loop) -> None:
    torch.manual_seed(0)
    with loop() as session:
        found = [*session.findings(), *session.findings(resolved=True)]
    assert [str(f) for f in found if f.severity is not Severity.INFO] == []


def test_readings_go_on_where_the_script_gives_a_tensor_another_shape() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe, dead = GradientProbe(model), []
    for step in range(1, 8):
        if step == 3:
            for name, size in (("0.weight", 4), ("0.bias", 4)):
                parameter = model.get_parameter(name)
                parameter.data = parameter.data[:size]
            second = model.get_parameter("2.weight")
            second.data = second.data[:, :4]
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.randn(32, 8)).square().mean())
        probe.remember(optimizer)
        optimizer.step()
        probe.read(optimizer)
        transfer = HostTransfer()
        reading = probe.collect(step, transfer, rate=0.1, updates=1)
        transfer.start()
        assert reading is not None
        dead.append(reading().rows[0].dead_rows)
    assert not math.isnan(dead[1])
    assert math.isnan(dead[2])  # nothing to compare with
    assert not any(map(math.isnan, dead[3:]))
