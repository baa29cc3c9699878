"""Saturated activations are a fault where the run does not learn, and a note where it does."""

from __future__ import annotations

import numpy as np
import pytest

from esper.contracts import Severity
from esper.diagnosis.base import Memory
from esper.diagnosis.facts import LayerPass, LossKind, ModelPass
from esper.diagnosis.observation import Observation
from esper.diagnosis.rules.saturation import Saturation


def behind_a_tanh(layer: str, saturated: float) -> LayerPass:
    return LayerPass(
        layer=layer,
        kind="Linear",
        input_std=0.9,
        input_spread=1.0,
        input_zeros=0.0,
        input_extremes=saturated,
        output_std=1.0,
        training=True,
    )


@pytest.mark.parametrize(
    ("last_loss", "steps", "severity"),
    [
        (2.9, 300, None),
        (1.5, 300, Severity.INFO),
        (1.5, 30, Severity.INFO),
        (2.8, 30, None),
        (1.5, 15, None),
    ],
    ids=["does not learn", "learns", "learns early", "may not learn", "too early to tell"],
)
def test_a_layer_that_is_on_or_off_is_no_fault_while_the_run_learns(
    last_loss: float, steps: int, severity: Severity | None
) -> None:
    layers = (behind_a_tanh("0", 0.0), behind_a_tanh("2", 0.8))
    observation = Observation(
        step=steps,
        layers=("0", "2"),
        loss_steps=np.arange(1, steps + 1),
        losses=np.geomspace(3.0, last_loss, steps),
        passes=(ModelPass(step=steps, layers=layers),),
    )
    evidence = Saturation().check(observation, Memory())
    assert evidence is not None
    assert evidence.severity is severity


@pytest.mark.parametrize(("loss", "severity"), [(1.0, Severity.INFO), (2.2, None)])
def test_a_run_that_learned_within_its_first_steps_learns(
    loss: float, severity: Severity | None
) -> None:
    """Ten classes: guessing costs 2.3, and none of the losses is as high."""
    layers = (behind_a_tanh("0", 0.0), behind_a_tanh("2", 0.8))
    seen = ModelPass(
        51, layers, output_shape=(16, 10), loss_kind=LossKind.CROSS_ENTROPY, loss_scale=1.0
    )
    observation = Observation(
        step=51,
        layers=("0", "2"),
        loss_steps=np.arange(1, 52),
        losses=np.full(51, loss),
        passes=(seen,),
    )
    evidence = Saturation().check(observation, Memory())
    assert evidence is not None
    assert evidence.severity is severity
