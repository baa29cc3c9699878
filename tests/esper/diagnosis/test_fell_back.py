"""A run that had learned, and whose loss is back where it began."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from esper.diagnosis.base import Evidence, Memory
from esper.diagnosis.facts import ModelPass
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.rules.fell_back import FellBack
from tests.esper.diagnosis.small_runs import Run, adam

NOISE = np.random.default_rng(0).normal(0, 0.05, 1_000)
FALL = np.concatenate([np.full(40, 2.3), np.geomspace(2.3, 0.2, 260), np.full(100, 0.2)])


def check(
    end: NDArray[np.float64],
    *,
    optimizers: int = 1,
    held_out: tuple[float, ...] = (),
    passes: Sequence[tuple[int, float]] = (),
    other_data_since: int = -1,
) -> Evidence | None:
    """After 400 steps in which the loss fell from 2.3 to 0.2."""
    losses = np.concatenate([FALL, end])
    losses = losses + NOISE[: len(losses)]
    return FellBack().check(
        Observation(
            step=len(losses),
            loss_steps=np.arange(1, len(losses) + 1),
            losses=losses,
            held_out=[(100 * (at + 1), loss) for at, loss in enumerate(held_out)],
            optimizers=optimizers,
            passes=[ModelPass(step, input_rms=size) for step, size in passes],
            other_data_since=other_data_since,
        ),
        Memory(),
    )


def test_a_loss_that_stays_where_it_began_is_told() -> None:
    found = check(np.full(60, 2.2))
    assert found is not None
    assert 300 <= int(found.observed.split("step ")[1].split(",")[0]) <= 410
    assert check(np.full(60, 2.2), held_out=(2.2, 1.0, 0.3, 0.3, 2.2)) is not None


@pytest.mark.parametrize(
    "end",
    [
        np.concatenate([np.full(12, 2.2), np.full(50, 0.3)]),
        np.geomspace(2.3, 0.8, 60),
        np.full(60, 1.2),
        np.full(30, 2.2),
    ],
    ids=["a spike", "learns harder data", "gave half of it back", "too short"],
)
def test_what_comes_back_or_falls_again_is_not_told(end: NDArray[np.float64]) -> None:
    assert check(end) is None


def test_what_was_learned_is_still_there() -> None:
    assert check(np.full(60, 2.2), held_out=(2.2, 1.0, 0.3, 0.3, 0.32)) is None


def test_a_loss_of_two_that_compete_says_nothing() -> None:
    with pytest.raises(Unknown):
        check(np.full(60, 2.2), optimizers=2)


def test_a_run_whose_labels_break_falls_back() -> None:
    torch.manual_seed(0)

    def shuffle(run: Run, step: int) -> None:
        if step == 130:
            x, y = run.data
            run.data = (x, y[torch.randperm(len(y))])

    result = Run(optimizer=lambda m: adam(m, 3e-3), before=shuffle, steps=210).go()
    assert result.steps["fell_back"] <= 210
    assert result.first("fell_back").since_step >= 130


def test_nothing_is_done_before_the_inputs_of_now_were_seen() -> None:
    seen = check(np.full(60, 2.2), passes=[(1, 0.5), (450, 0.5)])
    unseen = check(np.full(60, 2.2), passes=[(1, 0.5), (50, 0.5)])
    assert seen is not None
    assert unseen is not None
    assert (seen.passes, unseen.passes) == (False, True)


@pytest.mark.parametrize(("size", "only_tell"), [(1.0, True), (0.52, False), (math.nan, False)])
def test_a_run_that_gets_other_inputs_is_not_sent_back(size: float, only_tell: bool) -> None:
    """No earlier weights know them. Measured: accuracy of 0.83 left alone, and 0.76 rewound."""
    found = check(np.full(60, 2.2), passes=[(1, 0.5), (50, 0.5), (450, size)])
    assert found is not None
    assert found.only_tell is only_tell
    assert ("the inputs had a size of 0.5 and have 1 now" in found.observed) is only_tell


def test_what_was_learned_on_other_data_does_not_count() -> None:
    assert check(np.full(160, 2.2), other_data_since=400) is None
