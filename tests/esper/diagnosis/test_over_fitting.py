"""A held-out loss that rises is over-fitting where the training loss is below it."""

from __future__ import annotations

import numpy as np
import pytest

from esper.contracts import Severity
from esper.diagnosis import Observation
from esper.diagnosis.base import Memory
from esper.diagnosis.rules.over_fitting import OverFitting

STEPS = 1_000


@pytest.mark.parametrize(
    ("training_loss", "warned"),
    [
        (0.10, True),
        (0.38, False),  # a difference within the noise, as with augmented batches
        (0.60, False),  # dropout and augmentation are only there in training
    ],
)
def test_a_warning_needs_a_training_loss_below_the_held_out_one(
    training_loss: float, warned: bool
) -> None:
    """The held-out loss is 0.3 at its best, and 0.4 since."""
    at = np.arange(1, STEPS + 1)
    found = OverFitting().check(
        Observation(
            step=STEPS,
            loss_steps=at,
            losses=np.where(at <= STEPS // 2, 0.7, training_loss),
            held_out=[(int(step), 0.3 if step <= STEPS // 2 else 0.4) for step in at[99::100]],
        ),
        Memory(),
    )
    assert found is not None
    assert (found.severity is None) is warned
    assert warned or found.severity is Severity.INFO
