"""Sound scripts of many kinds, the first ones of tutorials among them, are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from sklearn.datasets import load_iris
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from tests.esper.diagnosis.small_runs import digits

STEPS = 300


@dataclass
class Script:
    """A model, its optimizer, and a step that trains it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Tensor]

    def run(self, session: esper.Session | None = None) -> list[float]:
        losses = []
        for step in range(STEPS):
            loss = self.loss(step)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            if session is not None:
                session.step(loss)
            losses.append(loss.item())
        return losses


def fitted(
    model: nn.Module,
    optimizer: Callable[..., torch.optim.Optimizer],
    rate: float,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> Script:
    """All data in each step."""
    return Script(model, optimizer(model.parameters(), lr=rate), lambda _: loss(model(x), y))


def summed(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="sum")


def line(optimizer: Callable[..., torch.optim.Optimizer], rate: float) -> Script:
    x = torch.rand(100, 1) * 10
    return fitted(nn.Linear(1, 1), optimizer, rate, x, 3 * x + 2 + torch.randn(100, 1))


def polynomial() -> Script:
    x = torch.linspace(-torch.pi, torch.pi, 2000)
    powers = x[:, None].pow(torch.tensor([1, 2, 3]))
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0, 1))
    return fitted(model, torch.optim.SGD, 1e-6, powers, torch.sin(x), summed)


def random_sum() -> Script:
    model = nn.Sequential(nn.Linear(1000, 100), nn.ReLU(), nn.Linear(100, 10))
    return fitted(model, torch.optim.SGD, 1e-4, torch.randn(64, 1000), torch.randn(64, 10), summed)


def parabola() -> Script:
    x = torch.linspace(-1, 1, 100)[:, None]
    model = nn.Sequential(nn.Linear(1, 10), nn.ReLU(), nn.Linear(10, 1))
    return fitted(model, torch.optim.SGD, 0.2, x, x**2 + 0.2 * torch.rand(100, 1))


def exclusive_or() -> Script:
    x, y = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([[0.0], [1], [1], [0]])
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())
    return fitted(model, torch.optim.Adam, 0.1, x, y, F.binary_cross_entropy)


def iris() -> Script:
    data = load_iris()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    return fitted(model, torch.optim.Adam, 0.1, x, y, F.cross_entropy)


def constant() -> Script:
    target = torch.full((8, 1), 100.0)
    return fitted(nn.Sequential(nn.Linear(1, 1)), torch.optim.SGD, 0.1, torch.ones(8, 1), target)


def spiral(optimizer: Callable[..., torch.optim.Optimizer], rate: float) -> Script:
    """Weights that start a hundred times smaller than usual."""
    turn, radius = torch.linspace(0, 4, 100), torch.linspace(0, 1, 100)
    angles = [2.5 * (turn + 4 * arm + 0.2 * torch.randn(100)) for arm in range(3)]
    x = torch.cat([radius[:, None] * torch.stack([a.sin(), a.cos()], 1) for a in angles])
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.01)
    y = torch.arange(3).repeat_interleave(100)
    return fitted(model, optimizer, rate, x, y, F.cross_entropy)


def one_sample_at_a_time() -> Script:
    """A hinge loss, which is zero for most samples once it has learned."""
    x = torch.randn(300, 2)
    y = torch.sign(x[:, 0] + 0.7 * torch.randn(300))
    model = nn.Linear(2, 1)

    def loss(_: int) -> Tensor:
        row = torch.randint(len(x), (1,))
        return F.relu(1 - y[row] * model(x[row])[:, 0]).mean()

    return Script(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)


def classes_one_sample_at_a_time() -> Script:
    """The loss of single samples is above that of guessing for long, and the mean falls slowly."""
    x, y = digits()
    model = nn.Linear(64, 10)

    def loss(_: int) -> Tensor:
        row = torch.randint(len(x), (1,))
        return F.cross_entropy(model(x[row]), y[row])

    return Script(model, torch.optim.SGD(model.parameters(), lr=0.13), loss)


def policy_gradient() -> Script:
    policy = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

    def loss(_: int) -> Tensor:
        seen = torch.randn(64, 8)
        chosen = torch.distributions.Categorical(logits=policy(seen))
        action = chosen.sample()
        reward = (action == seen[:, :4].argmax(1)).float()
        return -(chosen.log_prob(action) * (reward - reward.mean())).mean()

    return Script(policy, torch.optim.Adam(policy.parameters(), lr=3e-3), loss)


def penalty_that_begins_at_zero() -> Script:
    """A tuned policy is held near the one that it came from; its loss is on both sides of zero."""
    policy = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6))
    older = copy.deepcopy(policy).requires_grad_(False)

    def loss(_: int) -> Tensor:
        seen = torch.randn(64, 8)
        scores = policy(seen)
        chosen = torch.distributions.Categorical(logits=scores)
        action = chosen.sample()
        reward = (action == seen[:, :6].argmin(1)).float()
        gain = (chosen.log_prob(action) * (reward - reward.mean())).mean()
        away = scores.log_softmax(1) - older(seen).log_softmax(1)
        return 0.05 * (scores.softmax(1) * away).sum(1).mean() - gain

    return Script(policy, torch.optim.AdamW(policy.parameters(), lr=1e-3), loss)


class Uncertain(nn.Module):
    """A linear layer whose weights are drawn: means, and deviations that all start equal."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(outputs, inputs) * 0.1)
        self.deviation = nn.Parameter(torch.full((outputs, inputs), -5.0))

    def forward(self, x: Tensor) -> Tensor:
        deviation = F.softplus(self.deviation)
        return x @ (self.mean + deviation * torch.randn_like(deviation)).T


def uncertain_weights() -> Script:
    x, y = digits()
    model = nn.Sequential(Uncertain(64, 32), nn.ReLU(), Uncertain(32, 10))
    return fitted(model, torch.optim.Adam, 3e-3, x, y, F.cross_entropy)


def trained_before() -> Script:
    """It goes on from good weights with a low rate."""
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    fitted(model, torch.optim.Adam, 1e-2, x, y, F.cross_entropy).run()
    return fitted(model, torch.optim.SGD, 1e-4, x, y, F.cross_entropy)


class Adapted(nn.Module):
    """A frozen layer and two thin matrices, of which one starts at zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, layer.in_features) * 0.01)
        self.up = nn.Parameter(torch.zeros(layer.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 4 * x @ self.down.T @ self.up.T


def adapters() -> Script:
    """A model of some classes learns the other ones, with a new head that starts at zero."""
    x, y = digits()
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)]
    known = y < 5
    model = nn.Sequential(*layers)
    fitted(model, torch.optim.Adam, 1e-3, x[known], y[known], F.cross_entropy).run()
    for place in (0, 2):
        layer = model[place]
        assert isinstance(layer, nn.Linear)
        model[place] = Adapted(layer)
    model[4] = nn.Linear(64, 5)
    nn.init.zeros_(model[4].weight)
    return fitted(model, torch.optim.AdamW, 1e-3, x[~known], y[~known] - 5, F.cross_entropy)


SOUND: dict[str, Callable[[], Script]] = {
    "a line, SGD": lambda: line(torch.optim.SGD, 0.01),
    "a line, Adam": lambda: line(torch.optim.Adam, 0.1),
    "a polynomial, its squares are summed": polynomial,
    "random targets, their squares are summed": random_sum,
    "a parabola": parabola,
    "exclusive or": exclusive_or,
    "irises": iris,
    "a constant that is far away": constant,
    "a policy gradient": policy_gradient,
    "small weights, Adam": lambda: spiral(torch.optim.Adam, 0.05),
    "small weights, Adagrad": lambda: spiral(torch.optim.Adagrad, 1.0),
    "batches of one sample": one_sample_at_a_time,
    "classes, batches of one sample": classes_one_sample_at_a_time,
    "a penalty that begins at zero": penalty_that_begins_at_zero,
    "weights that are drawn": uncertain_weights,
    "a model that was trained before": trained_before,
    "adapters of a frozen model": adapters,
}


@pytest.mark.parametrize("script", SOUND.values(), ids=SOUND)
def test_a_sound_script_is_left_alone_to_the_bit(script: Callable[[], Script]) -> None:
    torch.manual_seed(0)
    expected = script().run()
    torch.manual_seed(0)
    attached = script()
    with esper.attach(attached.model, attached.optimizer, mode="automatic", server="") as session:
        assert attached.run(session) == expected
        assert not session.remedies
        assert "repeated_initialisation" not in {found.slug for found in session.findings()}


def test_batches_that_the_script_skips_are_no_fault_of_the_weights() -> None:
    """A third of them has a value that is not finite, often several in a row."""
    x, y = digits()
    x[::40] = torch.nan

    def run(session_of: Callable[..., esper.Session] | None = None) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        session = session_of(model, optimizer) if session_of is not None else None
        losses = []
        for _ in range(STEPS):
            rows = torch.randint(len(x), (16,))
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            if loss.isfinite():
                torch.autograd.backward(loss)
                optimizer.step()
            if session is not None:
                session.step(loss)
            losses.append(loss.item())
        if session is not None:
            assert not session.remedies
            session.close()
        return losses

    attached = run(lambda *parts: esper.attach(*parts, mode="automatic", server=""))
    assert str(attached) == str(run())  # NaN equals NaN here


def tasks(step: int, y: Tensor) -> Tensor:
    return y if step // 100 % 2 == 0 else 9 - y


def switched() -> Script:
    """The targets of the same inputs change twice."""
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 10))

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(x), (64,))
        return F.cross_entropy(model(x[rows]), tasks(step, y)[rows])

    return Script(model, torch.optim.Adam(model.parameters(), lr=3e-3), loss)


def target_network() -> Script:
    """A network learns from an older copy of itself, which is renewed."""
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 2))
    older = copy.deepcopy(model)

    def loss(step: int) -> Tensor:
        if step % 100 == 0:
            older.load_state_dict(model.state_dict())
        seen = torch.randn(64, 4)
        action = torch.randint(0, 2, (64,))
        with torch.no_grad():
            after = older(seen + 0.1 * torch.randn(64, 4)).max(1).values
        target = (seen[:, 0] > 0).float() * action + 0.9 * after
        return F.smooth_l1_loss(model(seen)[torch.arange(64), action], target)

    return Script(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss)


def lost() -> Script:
    """The targets have nothing to do with the inputs any more."""
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 10))

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(x), (64,))
        mixed = rows if step < 120 else rows[torch.randperm(64)]
        return F.cross_entropy(model(x[rows]), y[mixed])

    return Script(model, torch.optim.Adam(model.parameters(), lr=3e-3), loss)


OTHER_DATA = {"other targets": switched, "a target network": target_network}


@pytest.mark.parametrize("script", OTHER_DATA.values(), ids=OTHER_DATA)
def test_a_jump_that_comes_of_other_data_costs_a_run_nothing(
    script: Callable[[], Script],
) -> None:
    torch.manual_seed(0)
    alone = script().run()
    torch.manual_seed(0)
    attached = script()
    rate = attached.optimizer.param_groups[0]["lr"]
    with esper.attach(attached.model, attached.optimizer, mode="automatic", server="") as session:
        losses = attached.run(session)
        assert sum(losses[-20:]) < 1.3 * sum(alone[-20:])
        assert not [remedy for remedy in session.remedies if remedy.in_force]
        assert attached.optimizer.param_groups[0]["lr"] == rate


def test_a_rewind_that_shows_other_data_is_undone_to_the_bit_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    script = lost()
    with esper.attach(script.model, script.optimizer, mode="automatic", server="") as session:
        script.run(session)
    said = capsys.readouterr().err
    assert "the data or the targets have changed since" in said
    assert "equal to the bit" in said


def plateau_of_columns() -> Script:
    """The first model of the tutorials: wide, plain SGD, a rate that is slow and no fault."""
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    model.append(nn.Linear(512, 10))

    def loss(_: int) -> Tensor:
        rows = torch.randint(len(x), (64,))
        return F.cross_entropy(model(x[rows]), y[rows])

    return Script(model, torch.optim.SGD(model.parameters(), lr=1e-3), loss)


def test_a_slow_first_model_gets_faster_and_never_worse() -> None:
    torch.manual_seed(0)
    script = plateau_of_columns()
    with esper.attach(script.model, script.optimizer, mode="automatic", server="") as session:
        losses = script.run(session)
        slugs = {finding.slug for finding in session.findings()}
    assert max(losses) < 2.5
    assert losses[-1] < 2.2 < losses[0]
    assert "update_ratio_low" not in slugs
