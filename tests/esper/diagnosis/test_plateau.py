"""A loss that has stopped falling is one finding, not one for each wave of its trend."""

from __future__ import annotations

import numpy as np
import pytest

from esper.diagnosis import Observation
from esper.diagnosis.base import Memory
from esper.diagnosis.rules.plateau import Plateau

STEPS = 4_000


def falling(share: float) -> Observation:
    """By this share of its level over the newer half of the steps."""
    at = np.arange(1, STEPS + 1)
    noise = np.random.default_rng(0).normal(0.0, 0.01, STEPS)
    losses = 1.0 - share * (at - STEPS / 2) / (STEPS / 2) + noise
    return Observation(step=STEPS, loss_steps=at, losses=losses, rates=[(1, 0.1), (STEPS, 0.1)])


@pytest.mark.parametrize("sign", [1, -1], ids=["falls", "rises"])
@pytest.mark.parametrize(
    ("share", "opens", "stays"), [(0.0, True, True), (0.007, False, True), (0.02, False, False)]
)
def test_an_open_plateau_ends_with_a_clear_change(
    share: float, opens: bool, stays: bool, sign: int
) -> None:
    observation = falling(sign * share)
    for is_open, found in ((False, opens), (True, stays)):
        evidence = Plateau().check(observation, Memory(is_open=is_open))
        assert (evidence is not None) is found
