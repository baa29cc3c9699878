"""The part of the matrix that takes no minutes: every model is watched, some layers grafted."""

from __future__ import annotations

import pytest
import torch

from esper import blueprints
from tests.matrix import trial
from tests.matrix.zoo import THIRD_PARTY, ZOO

NAMES = [name for name, specimen in ZOO.items() if specimen.library not in THIRD_PARTY]
STEPS = 5
TRIALS = 2


@pytest.mark.parametrize("name", NAMES)
def test_watching_changes_no_loss_to_the_bit(name: str) -> None:
    specimen = ZOO[name]
    expected, expected_in_eval = trial.unchanged_losses(specimen)
    losses, in_eval, findings = trial.watched_losses(specimen)
    assert losses == expected
    assert torch.equal(in_eval, expected_in_eval)
    assert [f for f in findings if f.severity != "info"] == []


@pytest.mark.parametrize("name", NAMES)
def test_grafts_come_and_go_to_the_bit(name: str) -> None:
    """Other blueprints at other models: the full matrix tries all at all."""
    specimen = ZOO[name]
    expected, _ = trial.unchanged_losses(specimen)
    fitting = [
        (layer, blueprint)
        for layer in trial.representatives(trial.seen_layers(specimen), 1)
        for blueprint in blueprints.list_blueprints()
        if not blueprint.supports(layer)
    ]
    stride = max(1, len(fitting) // TRIALS)
    for layer, blueprint in fitting[NAMES.index(name) % stride :: stride]:
        outcome = trial.examine(specimen, expected, layer, blueprint, steps=STEPS)
        assert outcome.faults == [], (layer.name, blueprint.slug)
        assert outcome.equal_losses == STEPS


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_before_anything_is_touched(name: str) -> None:
    specimen = ZOO[name]
    reasons: dict[tuple[str, str], tuple[str, str]] = {}
    for layer in trial.seen_layers(specimen):
        for blueprint in blueprints.list_blueprints():
            reason = blueprint.supports(layer)
            if reason:
                reasons[layer.kind, reason] = layer.name, blueprint.slug
    assert trial.refusals(specimen, [*reasons.values()]) == [reason for _, reason in reasons]
