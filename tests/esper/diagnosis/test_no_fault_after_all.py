"""What looks like a fault at first, in runs that learn: a note, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory
from esper.diagnosis.facts import GradientRow, Gradients, LossKind, ModelPass, TensorFacts
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.rules.dying_relu import DyingRelu
from esper.diagnosis.rules.loss_spike import LossSpike
from esper.diagnosis.rules.memorised_noise import MemorisedNoise
from esper.diagnosis.rules.oscillating_loss import OscillatingLoss
from esper.diagnosis.rules.over_fitting import OverFitting
from esper.diagnosis.rules.slow_convergence import SlowConvergence
from esper.diagnosis.rules.update_ratio_high import UpdateRatioHigh
from esper.diagnosis.rules.update_ratio_low import UpdateRatioLow
from tests.esper.diagnosis.small_runs import Run, adam, digits


def deep_as_torch_makes_it(activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(9):
        layers += [nn.Linear(64, 64), activation()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_a_faint_signal_is_a_note_while_it_grows(activation: type[nn.Module]) -> None:
    """Measured: with Adam these nets learn digits to 0.9; with SGD they stay at guessing."""
    torch.manual_seed(1)
    grows = Run(deep_as_torch_makes_it(activation), optimizer=adam, steps=60).go()
    assert grows.alarms() == []
    assert grows.steps["bad_initialisation"] == 1
    torch.manual_seed(1)
    stands = Run(deep_as_torch_makes_it(activation), optimizer=sgd, steps=20).go()
    assert any(alarm.startswith("bad_initialisation") for alarm in stands.alarms())


def test_a_faint_signal_that_does_not_grow_is_told() -> None:
    """With a rate this low even Adam's updates change nothing within 30 steps."""
    torch.manual_seed(1)
    model = deep_as_torch_makes_it(nn.GELU)
    result = Run(model, optimizer=lambda m: adam(m, 1e-6), steps=32).go()
    assert any(alarm.startswith("bad_initialisation") for alarm in result.alarms())


def test_a_faint_signal_without_biases_is_told_at_once() -> None:
    """Adam's first updates bring it back, all units alike, and the net stays at guessing."""
    torch.manual_seed(1)
    model = deep_as_torch_makes_it(nn.Tanh)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.5 / 64**0.5)
            nn.init.zeros_(layer.bias)
    result = Run(model, optimizer=adam, steps=3).go()
    assert any(alarm.startswith("bad_initialisation") for alarm in result.alarms())
    assert result.steps["bad_initialisation"] == 1


@pytest.mark.parametrize("rare", [False, True])
@pytest.mark.parametrize("bad_start", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_a_long_run_that_only_guesses_is_told(rare: bool, bad_start: bool, learns: bool) -> None:
    """Its loss may have fallen from a bad start, and its updates are of a usual size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    model.append(nn.Linear(16, 10))
    if bad_start:
        assert isinstance(model[-1].bias, nn.Parameter)
        nn.init.normal_(model[-1].bias, std=2.0)
    x, y = digits()
    y = torch.where(y < 8, 0, y) if rare else y
    x = x if learns else torch.ones_like(x)
    result = Run(model, (x, y), optimizer=lambda m: adam(m, 3e-3), steps=600).go()
    told = any(alarm.startswith("slow_convergence") for alarm in result.alarms())
    assert told is not learns, result.alarms()


class FineTuned(nn.Module):
    """A trunk in evaluation mode, and a head."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2)
        )
        self.trunk.requires_grad_(not frozen).eval()
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.trunk(x))
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_trunk_is_in_evaluation_mode_on_purpose(frozen: bool) -> None:
    torch.manual_seed(0)
    result = Run(FineTuned(frozen=frozen), steps=6).go()
    assert ("training_in_eval_mode" in result.steps) is not frozen


def updates(*sizes: float) -> Evidence | None:
    """The newest update is the last one; the loss stands still."""
    readings = [
        Gradients(step, step, (GradientRow("w", 1.0, change=size),), rate=0.1, updates=1)
        for step, size in enumerate(sizes, 1)
    ]
    return UpdateRatioLow().check(
        Observation(
            step=40,
            loss_steps=np.arange(1, 41),
            losses=np.full(40, 0.7),
            rates=[(1, 0.1), (40, 0.1)],
            gradients=readings,
        ),
        Memory(),
    )


def test_updates_that_pass_below_the_limit_are_not_too_small() -> None:
    assert updates(4e-6, 6e-6, 1e-5, 2e-5, 3e-5, 9e-6, 9e-6) is None
    assert updates(1e-5, 1e-5, 4e-6, 3e-6, 3e-6, 3e-6) is not None  # Adam's first are larger


@pytest.mark.parametrize(
    ("dead", "last_loss", "severity"),
    [(0.75, 0.69, None), (0.75, 0.4, Severity.INFO), (0.9, 0.4, None)],
    ids=["stands still", "learns", "nearly all units"],
)
def test_many_dead_units_are_a_note_while_the_run_learns(
    dead: float, last_loss: float, severity: Severity | None
) -> None:
    rows = (GradientRow("0.weight", 1.0, dead), GradientRow("2.weight", 1.0, 0.0))
    tensors = tuple(TensorFacts(row.name, row.name[0], "Linear", (5, 5)) for row in rows)
    found = DyingRelu().check(
        Observation(
            step=200,
            layers=("0", "2"),
            tensors=tensors,
            loss_steps=np.arange(1, 201),
            losses=np.geomspace(0.69, last_loss, 200),
            gradients=(Gradients(200, 9, rows),),
        ),
        Memory(),
    )
    assert found is not None
    assert found.severity is severity


@pytest.mark.parametrize(("last_loss", "severity"), [(1.1, None), (0.9, Severity.INFO)])
def test_who_comes_down_to_guessing_from_a_bad_start_has_learned_nothing(
    last_loss: float, severity: Severity | None
) -> None:
    rows = (GradientRow("0.weight", 1.0, 0.75), GradientRow("2.weight", 1.0, 0.0))
    tensors = tuple(TensorFacts(row.name, row.name[0], "Linear", (5, 5)) for row in rows)
    losses = np.full(200, last_loss)
    losses[:20] = 300.0
    found = DyingRelu().check(
        replace(
            guessing(losses),
            layers=("0", "2"),
            tensors=tensors,
            gradients=(Gradients(200, 9, rows),),
        ),
        Memory(),
    )
    assert found is not None
    assert found.severity is severity


@pytest.mark.parametrize(("rows", "enough"), [(1, 64), (4, 16), (32, 4)])
def test_a_unit_that_is_off_for_a_few_samples_is_not_dead(rows: int, enough: int) -> None:
    """Four readings of single samples are all off by chance, mostly where the layer is narrow."""
    gradients = (GradientRow("0.weight", 1.0, 1.0), GradientRow("2.weight", 1.0, 0.0))
    tensors = tuple(TensorFacts(row.name, row.name[0], "Linear", (5, 5)) for row in gradients)
    rule, memory = DyingRelu(), Memory()
    told = []
    for reading in range(4, 70):
        observation = Observation(
            step=reading,
            layers=("0", "2"),
            tensors=tensors,
            passes=(ModelPass(1, output_shape=(rows, 3)),),
            gradients=(Gradients(reading, reading, gradients),),
        )
        try:
            told.append((reading, rule.check(observation, memory)))
        except Unknown:
            continue
    assert told[0][0] == enough
    assert told[0][1] is not None


def jump(level: float, to: float) -> Evidence | None:
    losses = np.concatenate([np.geomspace(2.3, level, 100), np.full(40, level), np.full(3, to)])
    return LossSpike().check(
        Observation(step=143, loss_steps=np.arange(1, 144), losses=losses), Memory()
    )


@pytest.mark.parametrize(
    ("level", "to", "severity"), [(0.003, 0.05, Severity.INFO), (0.3, 1.5, None)]
)
def test_a_spike_far_below_the_first_loss_is_a_note(
    level: float, to: float, severity: Severity | None
) -> None:
    found = jump(level, to)
    assert found is not None
    assert found.severity is severity


@pytest.mark.parametrize(("rows", "why"), [(1, "so few samples"), (8, "no health frame")])
def test_the_losses_of_single_samples_swing_by_themselves(rows: int, why: str) -> None:
    observation = Observation(
        step=60,
        loss_steps=np.arange(1, 61),
        losses=np.tile([0.1, 2.0], 30),
        passes=(ModelPass(1, output_shape=(rows, 1)),),
    )
    with pytest.raises(Unknown, match=why):
        OscillatingLoss().check(observation, Memory())


def guessing(losses: NDArray[np.float64], rows: int = 16, every: int = 10) -> Observation:
    """Three classes, whose guessing costs 1.1; updates of 0.03 of the weights."""
    step = len(losses)
    moved = (GradientRow("0.weight", 1.0, 0.0, 1.0, 0.03),)
    return Observation(
        step=step,
        layers=("0",),
        trainable_matrices=2,
        loss_steps=np.arange(1, step + 1),
        losses=losses,
        passes=(
            ModelPass(1, output_shape=(rows, 3), loss_kind=LossKind.CROSS_ENTROPY, loss_scale=1.0),
        ),
        gradients=tuple(Gradients(at, at, moved) for at in (step - 2 * every, step - every, step)),
    )


def noisy(first: float, last: float, steps: int) -> NDArray[np.float64]:
    dice = np.random.default_rng(0)
    return np.linspace(first, last, steps) + 0.05 * dice.permutation(np.linspace(-1, 1, steps))


@pytest.mark.parametrize(("now", "told"), [(1.6, True), (1.0, False)])
def test_a_loss_above_that_of_guessing_is_no_fault_while_it_falls(now: float, told: bool) -> None:
    losses = np.linspace(1.6 if told else 2.0, now, 50)
    assert (UpdateRatioHigh().check(guessing(losses), Memory()) is not None) is told


def test_a_slow_start_at_a_sound_rate_is_no_fault() -> None:
    """Measured: a net of three units leaves the loss of guessing so slowly with Adam."""
    assert UpdateRatioHigh().check(guessing(noisy(1.17, 1.09, 40)), Memory()) is None


@pytest.mark.parametrize(
    ("level", "steps", "severity"),
    [(1.25, 60, Severity.CAUTION), (1.14, 60, Severity.INFO), (1.14, 310, Severity.CAUTION)],
)
def test_a_loss_a_little_above_guessing_is_a_note_for_300_steps(
    level: float, steps: int, severity: Severity
) -> None:
    """Measured: nets of sigmoids learn by themselves after up to 272 such steps."""
    found = UpdateRatioHigh().check(guessing(noisy(level, level, steps)), Memory())
    assert found is not None
    assert found.severity is severity


def test_updates_that_are_seldom_read_are_judged_too() -> None:
    """On long steps, where three readings take longer than the forty losses."""
    assert UpdateRatioHigh().check(guessing(noisy(1.14, 1.14, 310), every=100), Memory())


def test_batches_of_any_size_are_judged() -> None:
    """320 samples are 107 losses of three, which have no equal halves."""
    found = UpdateRatioHigh().check(guessing(noisy(1.25, 1.25, 120), rows=3), Memory())
    assert found is not None


@pytest.mark.parametrize(("now", "severity"), [(0.12, Severity.INFO), (0.6, None)])
def test_over_fitting_that_keeps_what_was_learned_is_a_note(
    now: float, severity: Severity | None
) -> None:
    at = np.arange(1, 1_001)
    found = OverFitting().check(
        Observation(
            step=1_000,
            loss_steps=at,
            losses=np.geomspace(2.3, 0.002, 1_000),
            held_out=[(int(step), 0.08 if step <= 500 else now) for step in at[99::100]],
        ),
        Memory(),
    )
    assert found is not None
    assert found.severity is severity


@pytest.mark.parametrize(("level", "known"), [(0.2, False), (2.2, True)])
def test_held_out_data_of_another_kind_is_no_memorised_noise(level: float, known: bool) -> None:
    """The training loss was ``level`` at the first evaluation: what was held out is other data."""
    at = np.arange(1, 1_001)
    losses = np.where(at <= 20, 2.3, np.where(at <= 100, level, 0.2))
    observation = Observation(
        step=1_000,
        loss_steps=at,
        losses=losses,
        held_out=[(100, 5.0), (200, 5.1), (300, 5.2), (400, 5.3), (500, 5.4)],
    )
    check: Callable[[], Evidence | None] = lambda: MemorisedNoise().check(observation, Memory())  # noqa: E731
    if known:
        assert check() is not None
        return
    with pytest.raises(Unknown):
        check()


def test_a_deep_net_in_which_nothing_is_left_is_told_at_once() -> None:
    torch.manual_seed(0)
    model = deep_as_torch_makes_it(nn.Sigmoid)
    x, y = digits()
    result = Run(model, (x, y), loss=F.cross_entropy, steps=3).go()
    assert any(alarm.startswith("bad_initialisation") for alarm in result.alarms())


def worst_spike(losses: NDArray[np.float64]) -> Severity | None:
    """Of the finding at the last of these losses; None: there is none."""
    rule, memory, evidence = LossSpike(), Memory(), None
    for step in range(1, len(losses) + 1):
        steps = np.arange(1, step + 1)
        evidence = rule.check(
            Observation(step=step, loss_steps=steps, losses=losses[:step]), memory
        )
    if evidence is None:
        return None
    return evidence.severity or LossSpike.severity


@pytest.mark.parametrize(
    ("steps", "after", "severity"),
    [(40, 8e-4, Severity.INFO), (80, 8e-6, Severity.INFO), (80, 1e3, Severity.CRITICAL)],
)
def test_a_loss_that_begins_around_zero_and_rises_by_design_is_no_spike(
    steps: int, after: float, severity: Severity
) -> None:
    begin = np.random.default_rng(0).normal(0.0, 1e-6, steps)
    assert worst_spike(np.concatenate([begin, np.full(3, after)])) is severity


@pytest.mark.parametrize(("after", "critical"), [(150.0, False), (700.0, True)])
def test_a_loss_below_zero_has_a_spike_where_it_loses_all_it_has_learned(
    after: float, critical: bool
) -> None:
    fell = np.linspace(500.0, -98.0, 60)
    settled = -98.0 + np.random.default_rng(0).normal(0.0, 0.5, 60)
    found = worst_spike(np.concatenate([fell, settled, np.full(3, after)]))
    assert (found is Severity.CRITICAL) is critical


class Mixture(nn.Module):
    """A router that chooses one of four experts for each row, and never the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)) for _ in range(4)
        )
        with torch.no_grad():
            self.router.bias.copy_(torch.tensor([-20.0, -20.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(1).max(1)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        out: Tensor = outputs[torch.arange(len(x)), chosen] * share[:, None]
        return out


def test_experts_that_are_not_chosen_have_no_dead_units() -> None:
    """Measured: a sound mixture was rewound, and its rate lowered twice, for dying ReLUs."""
    torch.manual_seed(0)
    found = Run(Mixture(), steps=60).go().steps
    assert "dead_experts" in found
    assert "dying_relu" not in found


class OneKey(nn.Module):
    """Attention over a single key: its weight is 1, whatever the query and the key are."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 16) for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        one = [layer(x)[:, None] for layer in (self.query, self.key, self.value)]
        out: Tensor = self.head(F.scaled_dot_product_attention(*one)[:, 0])
        return out


class ClosedGate(nn.Module):
    """A branch that a schedule lets in later."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(64, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        trunk = F.relu(self.trunk(x))
        out: Tensor = self.head(trunk + self.gate * self.branch(trunk))
        return out


class HardChoice(nn.Module):
    """A choice without a gradient, as a router makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.choice, self.head = nn.Linear(64, 16), nn.Linear(16, 2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        trunk = F.relu(self.trunk(x))
        chosen = self.choice(trunk)
        share = (chosen > 0).float() + 0 * chosen
        out: Tensor = self.head(trunk) * (0.5 + share.mean(1, keepdim=True))
        return out


@pytest.mark.parametrize("kind", [OneKey, ClosedGate, HardChoice])
def test_a_layer_that_gets_no_gradient_though_nothing_is_off_has_no_dead_units(
    kind: Callable[[], nn.Module],
) -> None:
    """Measured: such runs were rewound after 5 steps, and ended at twice the loss."""
    torch.manual_seed(0)
    assert "dying_relu" not in Run(kind(), steps=30).go().steps


def test_units_that_die_in_numbered_blocks_are_told() -> None:
    """Those of a chain leave nothing alive before them; those of a branch leave its last bias."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(3)]
    with torch.no_grad():
        blocks[1][0].bias.fill_(-50.0)
    chain = nn.Sequential(nn.Linear(64, 64), nn.Sequential(*blocks), nn.Linear(64, 10))
    branch = nn.Sequential(nn.Linear(64, 64), Residual(blocks), nn.Linear(64, 10))
    for model in (chain, branch):
        assert "dying_relu" in Run(model, steps=30).go().steps


class Residual(nn.Module):
    def __init__(self, blocks: list[nn.Sequential]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(("level", "words"), [(1.6, "lower the learning rate"), (1.12, "")])
def test_a_run_that_is_worse_than_guessing_is_not_told_to_learn_faster(
    level: float, words: str
) -> None:
    found = SlowConvergence().check(
        replace(
            guessing(np.full(700, level)),
            step=700,
            gradients=(Gradients(700, 9, (), updates=1),),
        ),
        Memory(),
    )
    assert found is not None
    assert words in found.advice
    assert bool(found.advice) is bool(words)


def test_very_large_targets_are_not_called_whole_numbers() -> None:
    """In float32 they have no decimals, whatever they stand for."""

    def squares(out: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(out[:, 0], 1e9 * (target + 0.5))

    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1))
    with torch.no_grad():
        model[2].weight.mul_(1e10)
    assert "wrong_loss" not in Run(model, loss=squares, steps=12).go().steps


def test_a_layer_that_drops_nothing_in_evaluation_is_no_alarm() -> None:
    """Frozen modules keep a high dropout, and are in evaluation mode."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.95), nn.Linear(32, 10))

    def switch_off(run: Run, step: int) -> None:
        model[2].eval()

    assert "dropout_high" not in Run(model, before=switch_off, steps=12).go().steps


@pytest.mark.parametrize(("to", "may_pass"), [(1.5, True), (15.0, False)])
def test_a_spike_below_the_first_losses_may_pass(to: float, may_pass: bool) -> None:
    found = jump(0.3, to)
    assert found is not None
    assert found.may_pass is may_pass


def test_targets_that_jump_and_are_learned_at_once_are_not_answered() -> None:
    """As where they are computed with a copy of the model, which is renewed now and then.

    Measured: 3 of 100 healthy runs of Q-learning were clipped.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    with esper.attach(model, optimizer, mode="automatic", server="", verbose=False) as session:
        for step in range(150):
            x = torch.randn(32, 8, generator=generator)
            loss = F.mse_loss(model(x), torch.full((32, 1), 0.0 if step < 100 else 0.15))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)
        assert "loss_spike" in {finding.slug for finding in session.findings(resolved=True)}
        assert session._parts.remedies is not None
        assert session._parts.remedies.treatments == []


@pytest.mark.parametrize(("end", "passes"), [(0.4, True), (1.5, False)])
def test_a_spike_from_which_the_run_learns_again_is_not_answered(end: float, passes: bool) -> None:
    """As in the next stage of a curriculum; at a rate that is too high the loss stays up."""
    losses = np.concatenate(
        [np.geomspace(2.3, 0.1, 100), np.full(40, 0.1), np.geomspace(1.6, end, 30)]
    )
    memory = Memory()
    for step in range(1, len(losses) + 1):
        observation = Observation(
            step=step, loss_steps=np.arange(1, step + 1), losses=losses[:step]
        )
        found = LossSpike().check(observation, memory)
    assert found is not None
    assert found.passes is passes


@pytest.mark.parametrize("seed", [0, 1])
def test_a_curriculum_ends_as_if_esper_were_not_there(seed: int) -> None:
    """First two classes, then one more each 60 steps. Measured: accuracy of 0.96, and 0.87."""
    x, y = digits()

    def train(attach: bool) -> list[float]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = adam(model, 2e-3)
        how = {"mode": "automatic", "server": "", "verbose": False}
        session = esper.attach(model, optimizer, **how) if attach else None
        losses = []
        for step in range(200):
            rows = torch.nonzero(y < 2 + step // 60)[:, 0]
            rows = rows[torch.randint(len(rows), (32,))]
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
            if session is not None:
                session.step(loss)
        if session is not None:
            session.close()
        return losses

    assert train(attach=True) == train(attach=False)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.Identity])
def test_a_far_first_update_behind_a_batch_norm_is_a_note(norm: type[nn.Module]) -> None:
    """It makes the weights larger, so that later ones are small. Measured: 0.984, and 0.967."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for inputs in (64, 32):
        model.extend([nn.Linear(inputs, 32), norm(32), nn.ReLU()])
    model.append(nn.Linear(32, 10))
    result = Run(model, optimizer=lambda m: adam(m, 1.0), steps=8).go()
    severity = result.first("update_ratio_high").severity
    assert (severity is Severity.INFO) is (norm is nn.BatchNorm1d)


@pytest.mark.parametrize(
    ("excess", "level", "other_data", "told"),
    [
        (40.0, 1.3, -1, True),
        (40.0, 1.0, -1, False),  # it is below its first losses
        (3.0, 1.3, -1, False),
        (40.0, 1.3, 60, False),
    ],
    ids=["hurt", "learns", "sound updates", "other data"],
)
def test_a_run_that_an_update_has_hurt_is_told_although_later_updates_are_small(
    excess: float, level: float, other_data: int, told: bool
) -> None:
    """It had learned for forty steps, and its loss is above the first losses since."""
    losses = np.concatenate([noisy(1.1, 1.1, 20), noisy(0.8, 0.8, 60), noisy(level, level, 40)])
    small = (GradientRow("0.weight", 1.0, 0.0, 1.0, 0.001),)
    seen = replace(
        guessing(losses),
        gradients=tuple(Gradients(at, at, small) for at in (100, 110, 120)),
        update_excess=excess,
        other_data_since=other_data,
    )
    found = UpdateRatioHigh().check(seen, Memory())
    assert (found is not None) is told
    assert found is None or found.severity is Severity.CAUTION


@pytest.mark.parametrize("resumed", [False, True])
def test_a_long_run_at_its_end_has_not_learned_slowly(
    resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first losses are remembered where only the latest are kept, also by a checkpoint.

    Its rate was lowered by the schedule, so that its updates are small; automatic mode raised it.
    """
    monkeypatch.setattr("esper.sdk.run_state.LOSSES_KEPT", 200)
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = torch.sin(x[:, :1]) + 0.3 * torch.randn(256, 1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    session = esper.attach(model, optimizer, mode="automatic", server="", verbose=False)
    for step in range(650):
        if step == 200:
            optimizer.param_groups[0]["lr"] = 0.0005
        if step == 450 and resumed:
            state = session.state_dict()
            session.close()
            session = esper.attach(model, optimizer, mode="automatic", server="", verbose=False)
            session.load_state_dict(state)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)
    assert not [one for one in session.findings() if one.slug == "slow_convergence"]
    assert not session.remedies
    session.close()
