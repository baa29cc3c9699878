"""The held-out loss is measured at steps that another run of the same script repeats."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.exceptions import ConfigurationError
from esper.health.sampler import HealthSampler
from esper.sdk.evaluation_pace import CHANGE_EVERY, SHARE, SHORTEST, EvaluationPace


class Machine:
    """A clock that goes on by what steps and evaluations take.

    Args:
        load: how many times as long it all takes now; a busy machine changes it.
    """

    def __init__(
        self, step: float, evaluation: float, load: Callable[[], float] = lambda: 1.0
    ) -> None:
        self.now, self.step, self.evaluation, self.load = 1e6, step, evaluation, load

    def pass_by(self, seconds: float) -> None:
        self.now += seconds * self.load()


class Training:
    """A run on a machine.

    Attributes:
        evaluated: the steps at which the script's ``evaluate`` was called.
    """

    def __init__(self, machine: Machine, *, state: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.machine, self.evaluated = machine, list[int]()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.session = esper.attach(
            self.model, self.optimizer, evaluate=self.evaluate, verbose=False, server="", **options
        )
        self.clock = lambda: machine.now
        self.session._parts.evaluations._clock = self.clock
        if state is not None:
            self.session.load_state_dict(state)

    def evaluate(self) -> float:
        self.machine.pass_by(self.machine.evaluation)
        self.evaluated.append(self.session._parts.run.step)
        return 1.0

    def train(self, steps: int) -> Training:
        x = torch.randn(8, 4)
        for _ in range(steps):
            loss = self.model(x).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.machine.pass_by(self.machine.step)
            self.session.step(loss)
            sampler = self.session._parts.surgery.sampler
            if isinstance(sampler, HealthSampler) and sampler._clock is not self.clock:
                sampler._clock, sampler._last_exit = self.clock, self.machine.now
        self.session.close()
        return self


def busy(seed: int) -> Callable[[], float]:
    """Other programs take up to half of the processor, and at times nearly all of it."""
    dice = random.Random(seed)
    return lambda: dice.uniform(1.0, 2.0) * (30.0 if dice.random() < 0.01 else 1.0)


@pytest.mark.parametrize("evaluation", [0.0, 1e-3, 2.8e-3, 1.2e-2])
def test_a_busy_machine_evaluates_at_the_steps_of_a_quiet_one(evaluation: float) -> None:
    quiet = Training(Machine(1e-3, evaluation)).train(1_300)
    loaded = Training(Machine(1e-3, evaluation, busy(1))).train(1_300)

    assert loaded.evaluated == quiet.evaluated
    assert loaded.session.evaluate_every == quiet.session.evaluate_every


def test_what_was_recorded_makes_any_machine_evaluate_at_the_same_steps() -> None:
    first = Training(Machine(1e-3, 0.02)).train(900)
    again = Training(Machine(0.5, 0.0), evaluate_every=first.session.evaluate_every).train(900)

    assert len(first.session.evaluate_every) > 1
    assert again.evaluated == first.evaluated
    assert again.session.evaluate_every == first.session.evaluate_every


def test_a_run_that_goes_on_evaluates_where_it_would_have() -> None:
    whole = Training(Machine(1e-3, 0.004)).train(1_300)
    first = Training(Machine(1e-3, 0.004)).train(730)
    state = first.session.state_dict()
    rest = Training(Machine(1e-3, 0.004), state=state).train(570)

    assert first.evaluated + rest.evaluated == whole.evaluated
    assert rest.session.evaluate_every[0] == (0, SHORTEST)


def test_a_state_without_periods_is_taken_too() -> None:
    state = Training(Machine(1e-3, 0.0)).train(50).session.state_dict()
    del state["evaluate_every"]

    assert Training(Machine(1e-3, 0.0), state=state).train(60).evaluated == [100]


@pytest.mark.parametrize("cost", [0.1, 1.0, 5.0, 77.0, 1e4])
def test_evaluations_stay_inside_their_share(cost: float) -> None:
    """``cost`` is that of an evaluation, in steps; after the first, whose cost nobody knows."""
    pace, step, spent = EvaluationPace(), 0, 0.0
    for count in range(60):
        step = pace.after(step)
        pace.add(step, cost, 1.0)
        spent += cost if count else 0.0

    assert spent <= 1.01 * SHARE * step


def test_a_period_changes_only_after_fixed_evaluations_and_by_powers_of_two() -> None:
    dice, pace, step, changed = random.Random(0), EvaluationPace(), 0, []
    for count in range(1, 200):
        step, before = pace.after(step), pace.recorded
        pace.add(step, 10 ** dice.uniform(-2, 3), 1.0)
        if pace.recorded != before:
            changed.append(count)
            since, every = pace.recorded[-1]
            assert since == step
            assert (every // SHORTEST).bit_count() == 1
            assert every % SHORTEST == 0

    assert changed
    assert all(count in (1, 2) or count % CHANGE_EVERY == 0 for count in changed)


def test_a_first_evaluation_that_loads_code_does_not_set_the_pace() -> None:
    pace = EvaluationPace()
    pace.add(100, 64.0, 1.0)
    late = pace.after(100)
    pace.add(late, 0.5, 1.0)

    assert late == 3_200
    assert pace.after(late) == late + SHORTEST


@pytest.mark.parametrize("wrong", [0, -3, (), ((0, 0),), ((9, 100), (0, 100)), ((0,),), "often"])
def test_what_is_no_pace_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="evaluate_every must be"):
        Training(Machine(1.0, 1.0), evaluate_every=wrong)
