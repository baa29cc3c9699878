"""How long a jump of the learning rate is a question."""

from __future__ import annotations

import numpy as np
import pytest

from esper.diagnosis import Observation
from esper.diagnosis.base import Evidence, Memory
from esper.diagnosis.facts import LossKind, ModelPass
from esper.diagnosis.rules.rate_jump import FORGOTTEN_OPEN, RateJump

JUMP_AT = 100


def look(memory: Memory, *, steps_after: int, loss: float) -> Evidence | None:
    """A look at a run whose loss was 1 until its rate jumped, and is ``loss`` since."""
    step = JUMP_AT + steps_after
    at = np.arange(1, step + 1)
    found = RateJump().check(
        Observation(
            step=step,
            loss_steps=at,
            losses=np.where(at <= JUMP_AT, 1.0, loss),
            rates=[(10, 0.01), (40, 0.01), (JUMP_AT, 0.01), (JUMP_AT + 1, 1.0)],
        ),
        memory,
    )
    memory.is_open = found is not None
    return found


def test_a_jump_is_a_question_until_the_loss_is_back() -> None:
    memory = Memory()
    assert look(memory, steps_after=5, loss=3.0) is not None
    # A person was away for some minutes, and the loss fell by a part of what it had risen.
    assert look(memory, steps_after=5_000, loss=1.3) is not None
    assert look(memory, steps_after=5_001, loss=1.05) is None
    assert look(memory, steps_after=5_002, loss=3.0) is None


def test_after_a_long_time_the_new_level_is_the_usual_one() -> None:
    memory = Memory()
    assert look(memory, steps_after=5, loss=3.0) is not None
    assert look(memory, steps_after=FORGOTTEN_OPEN + 2, loss=3.0) is None


def test_a_loss_that_rises_long_after_a_jump_is_no_question_of_it() -> None:
    memory = Memory()
    assert look(memory, steps_after=5, loss=1.0) is None
    assert look(memory, steps_after=1_500, loss=3.0) is None


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ([0.01, 0.01, 0.01, 0.1, 0.1, 0.1, 1.0], True),  # gamma=10 in the place of gamma=0.1
        ([0.01, 0.01, 0.01, 0.1, 0.1, 1.0], True),
        ([0.001, 0.004, 0.016, 0.064, 1.0], False),  # a range test
    ],
)
def test_a_second_jump_is_told_where_the_first_did_no_harm(rates: list[float], told: bool) -> None:
    """Measured: the first jump was named, for which no good state was left to go back to."""
    memory, known, found = Memory(), [], None
    for place, rate in enumerate(rates):
        step = 50 * (place + 1)
        known.append((step, rate))
        losses = np.full(step, 1.0)
        if place + 1 == len(rates):
            losses[-20:] = 3.0
        found = (
            RateJump().check(
                Observation(
                    step=step, loss_steps=np.arange(1, step + 1), losses=losses, rates=known
                ),
                memory,
            )
            if place > 2
            else None
        )
    assert (found is not None) is told
    if found is not None:
        assert f"from {rates[-2]:g} to {rates[-1]:g}" in found.observed
        assert found.since_step == known[-2][0] + 1


@pytest.mark.parametrize(("level", "told"), [(1.45, True), (1.9, False)])
def test_a_jump_after_which_the_run_guesses_is_told_although_its_losses_were_noisy(
    level: float, told: bool
) -> None:
    """Measured: a rate of 1 instead of 0.001 after a resume; 2.5 was within four deviations."""
    noisy = level + 0.4 * np.sin(np.arange(60))
    seen = ModelPass(1, output_shape=(32, 10), loss_kind=LossKind.CROSS_ENTROPY, loss_scale=1.0)
    found = RateJump().check(
        Observation(
            step=70,
            loss_steps=np.arange(1, 71),
            losses=np.concatenate([noisy, np.full(10, 2.5)]),
            rates=[(10, 1e-3), (20, 1e-3), (40, 1e-3), (60, 1e-3), (61, 1.0)],
            passes=[seen],
        ),
        Memory(),
    )
    assert (found is not None) is told


def test_the_level_before_a_jump_is_that_of_the_newest_losses() -> None:
    """The rate was read long ago: a loss that has fallen since is no noise, and no level."""
    steps = np.arange(1, 157)
    losses = np.where(steps <= 151, 2.3 - steps / 130, 2.25)
    rates = [(10, 0.001), (40, 0.001), (100, 0.001), (152, 1.0)]
    memory = Memory()
    seen = [
        RateJump().check(
            Observation(step=now, loss_steps=steps[:now], losses=losses[:now], rates=rates), memory
        )
        for now in (152, 156)
    ]
    assert seen[-1] is not None
