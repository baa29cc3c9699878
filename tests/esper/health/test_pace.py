"""Frames are paced by steps: the same run measures at the same steps, however fast it is."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.exceptions import ConfigurationError
from esper.health.pace import BUDGET, Periods, SamplingPace, periods_of


def frames_at(pace: SamplingPace, steps: int, *, cost: float, step: float, begin: int = 0) -> Any:
    """Steps with a frame, where each frame costs ``cost`` seconds and each step takes ``step``."""
    pace.begin(begin + 1)
    found, due = [], pace.next_frame(begin)
    for now in range(begin + 1, begin + steps + 1):
        if now >= due:
            found.append(now)
            pace.add_frame(cost)
            pace.add_deep(2 * cost)
            pace.adapt(now, step)
            due = pace.next_frame(now)
    return found


def test_frames_come_at_multiples_of_the_shortest_period_until_it_may_change() -> None:
    found = frames_at(SamplingPace(), 100, cost=10.0, step=1e-3)

    assert found[:5] == [10, 20, 30, 40, 50]


def test_a_cheap_frame_keeps_the_shortest_period() -> None:
    assert frames_at(SamplingPace(), 3_000, cost=1e-6, step=1.0) == [*range(10, 3_001, 10)]


def test_a_dear_frame_lengthens_the_period_until_its_budget_is_kept() -> None:
    pace = SamplingPace(budget=0.01)
    frames_at(pace, 20_000, cost=0.02, step=0.1)
    last = pace.recorded[-1]

    assert 0.02 / last.frame <= 0.01 * 0.1 / 2
    assert 0.04 / last.deep <= 0.01 * 0.1 / 2
    assert last.deep % last.frame == 0


@pytest.mark.parametrize("later_cost", [0.01, 0.9], ids=["only the first is dear", "all are"])
def test_one_dear_sample_of_activations_does_not_end_them(later_cost: float) -> None:
    pace = SamplingPace()
    costs, deep_at, last, step = iter([0.9]), [], 0, 0
    for _ in range(2_000):
        step = pace.next_frame(step)
        pace.add_frame(1e-4)
        if pace.is_deep(step, last):
            deep_at.append(step)
            last = step
            pace.add_deep(next(costs, later_cost))
        pace.adapt(step, 0.02)

    assert deep_at[1] <= 400
    assert later_cost / (pace.at(step).deep * 0.02) <= BUDGET / 2


def test_periods_change_only_at_the_first_frame_from_a_fixed_step_on() -> None:
    pace = SamplingPace()
    noise = random.Random(0)
    pace.begin(1)
    due = pace.next_frame(0)
    for now in range(1, 10_001):
        if now >= due:
            pace.add_frame(noise.expovariate(1000.0))
            pace.add_deep(noise.expovariate(300.0))
            pace.adapt(now, noise.uniform(1e-3, 1e-1))
            due = pace.next_frame(now)
    points = [50, 100, 200, 500, *range(1_000, 10_001, 1_000)]

    assert len(pace.recorded) > 3
    for before, entry in zip(pace.recorded, pace.recorded[1:], strict=False):
        assert any(0 <= entry.since - point < before.frame for point in points)


def test_clocks_that_differ_a_little_choose_the_same_periods() -> None:
    noise = random.Random(1)
    plans = set()
    for _ in range(10):
        pace = SamplingPace()
        slower = noise.uniform(0.97, 1.03)
        frames_at(pace, 5_000, cost=2.9e-3 * slower, step=0.02 * noise.uniform(0.97, 1.03))
        plans.add(pace.recorded)

    assert len(plans) == 1


def test_a_recorded_plan_measures_at_the_same_steps_at_any_speed() -> None:
    first = SamplingPace()
    seen = frames_at(first, 4_000, cost=5e-3, step=0.01)
    again = SamplingPace(fixed=first.recorded)

    assert frames_at(again, 4_000, cost=5.0, step=1e-4) == seen
    assert again.recorded == first.recorded


def test_a_resumed_run_goes_on_with_the_recorded_periods() -> None:
    whole = SamplingPace()
    seen = frames_at(whole, 3_900, cost=5e-3, step=0.01)
    until = [entry for entry in whole.recorded if entry.since <= 620]
    resumed = SamplingPace()
    resumed.resume(until)

    assert frames_at(resumed, 3_280, cost=5e-3, step=0.01, begin=620) == [
        step for step in seen if step > 620
    ]


@pytest.mark.parametrize("bad", [0, -1, (), ((0, 0, 1),), ((5, 1, 1), (0, 1, 1)), "often", (1, 2)])
def test_a_plan_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match="sampling must be"):
        periods_of(bad)


def test_a_number_fixes_the_period() -> None:
    assert periods_of(20) == (Periods(0, 20, 100),)
    assert periods_of(None) is None


def run(steps: int, *, state: Any = None, **options: Any) -> tuple[list[int], esper.Session]:
    """Steps with a frame, and the session."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    seen = []
    with esper.attach(model, optimizer, **options) as session:
        if state is not None:
            session.load_state_dict(state)
        for _ in range(steps):
            loss = model(torch.randn(8, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)
            frame = session.frame()
            if frame is not None and frame.step not in seen:
                seen.append(frame.step)
    return seen, session


def test_a_session_records_its_periods_and_another_one_repeats_them() -> None:
    seen, session = run(230)
    frame = session.frame()
    assert frame is not None
    again, repeated = run(230, sampling=session.sampling)

    assert again == seen
    assert repeated.sampling == session.sampling
    assert frame.metrics["frame_period"] == next(
        entry[1] for entry in reversed(session.sampling) if entry[0] < frame.step
    )
    assert frame.metrics["deep_period"] >= frame.metrics["frame_period"]


def test_a_checkpoint_carries_the_periods() -> None:
    _, session = run(120, sampling=((0, 10, 50), (100, 30, 60)))
    seen, resumed = run(100, state=session.state_dict())

    assert resumed.sampling[:2] == ((0, 10, 50), (100, 30, 60))
    assert seen[:2] == [150, 180]


def test_a_state_without_periods_is_taken_too() -> None:
    _, session = run(20)
    state = session.state_dict()
    del state["sampling"]
    seen, _ = run(20, state=state)

    assert seen[0] == 30
