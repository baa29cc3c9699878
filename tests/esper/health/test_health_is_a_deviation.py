"""A layer's health falls when it leaves its own past or its peers, and when a finding names it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import esper
from esper.contracts import SIGNAL_INDEX, SIGNALS, HealthFrame, Severity, Signal
from esper.diagnosis import Change
from esper.health.deviation import FEWEST_FRAMES, Deviation
from tests.esper.conftest import LACKS_CAPACITY
from tests.esper.sdk.tiny_training import Training

LAYERS, LAST = 6, 40
Floats = NDArray[np.float32]
Change_ = Callable[[int, Floats], None]


def frames(change: Change_ = lambda *_: None, *, layers: int = LAYERS) -> list[Floats]:
    """Frames of layers whose norms differ by decades and vary by a third from frame to frame."""
    rng = np.random.default_rng(0)
    base = 10.0 ** np.linspace(-3, 1, layers)
    made = []
    for step in range(LAST):
        values = np.full((layers, len(SIGNALS)), np.nan, dtype=np.float32)
        for signal in (Signal.GRAD_NORM, Signal.ACT_STD, Signal.UPDATE_RATIO):
            noise = np.exp(0.3 * rng.standard_normal(layers))
            values[:, SIGNAL_INDEX[signal]] = base * noise
        values[:, SIGNAL_INDEX[Signal.INACTIVE_FRACTION]] = 0.05
        change(step, values)
        made.append(values)
    return made


def last_scores(change: Change_ = lambda *_: None, **how: int) -> Floats:
    deviation = Deviation()
    return [deviation.score(values) for values in frames(change, **how)][-1]


def times(signal: Signal, factor: float, rows: slice, since: int = LAST - 1) -> Change_:
    def change(step: int, values: Floats) -> None:
        if step >= since:
            values[rows, SIGNAL_INDEX[signal]] *= factor

    return change


def test_usual_noise_is_healthy_in_every_frame() -> None:
    deviation = Deviation()
    scores = [deviation.score(values) for values in frames()]
    assert np.min(scores) > 0.9


@pytest.mark.parametrize("signal", [Signal.GRAD_NORM, Signal.ACT_STD, Signal.UPDATE_RATIO])
@pytest.mark.parametrize("factor", [300.0, 1 / 300.0])
def test_a_layer_that_leaves_its_past_and_its_peers_is_seen(signal: Signal, factor: float) -> None:
    found = last_scores(times(signal, factor, slice(2, 3)))
    assert found[2] < 0.3
    assert np.delete(found, 2).min() > 0.7


def test_units_that_fall_silent_are_seen() -> None:
    found = last_scores(times(Signal.INACTIVE_FRACTION, 19.0, slice(4, 5)))
    assert found[4] < 0.5
    assert np.delete(found, 4).min() > 0.9


def test_a_jump_of_the_whole_run_is_seen_and_a_new_learning_rate_is_none() -> None:
    everywhere = slice(None)
    assert last_scores(times(Signal.GRAD_NORM, 1e4, everywhere)).max() < 0.3
    assert last_scores(times(Signal.UPDATE_RATIO, 1e-4, everywhere)).min() > 0.9


def test_what_has_lasted_is_usual() -> None:
    lasting = times(Signal.GRAD_NORM, 300.0, slice(2, 3), since=5)
    assert last_scores(lasting).min() > 0.9


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_few_layers_have_no_peers(layers: int) -> None:
    found = last_scores(times(Signal.GRAD_NORM, 1e6, slice(0, 1)), layers=layers)
    assert found.shape == (layers,)
    assert not (found[:1] > 0.3).any()


def test_nothing_is_unusual_before_the_past_is_known() -> None:
    deviation = Deviation()
    wild = frames(lambda step, values: values.__imul__(10.0 ** (step % 9)))
    for values in wild[:FEWEST_FRAMES]:
        assert deviation.score(values).tolist() == [1.0] * LAYERS
    assert deviation.score(np.full_like(wild[0], math.nan)).tolist() == [1.0] * LAYERS


def test_an_open_finding_that_names_the_layer_lowers_its_health() -> None:
    training = Training()
    with attached(training) as session:
        training.run(20, session)
        for severity, most in ((Severity.CAUTION, 0.7), (Severity.SERIOUS, 0.4)):
            finding = replace(LACKS_CAPACITY, layer="3", severity=severity)
            session._parts.findings.report(Change.OPENED, finding)
            frame = next_frame(training, session)
            assert frame.value("3", Signal.HEALTH) == pytest.approx(most)
            assert frame.value("0", Signal.HEALTH) > most
        session._parts.findings.report(Change.RESOLVED, finding)
        assert next_frame(training, session).value("3", Signal.HEALTH) > 0.7


def test_a_layer_that_dies_in_a_run_reads_poor_at_once() -> None:
    training = Training()
    with attached(training) as session:
        while training.run(10, session) and not usual(session):
            pass
        assert session.frame().column(Signal.HEALTH).min() > 0.7  # type: ignore[union-attr]
        with torch.no_grad():
            training.model.get_parameter("3.bias").fill_(-100.0)
        frame = next_frame(training, session)
        assert frame.value("3", Signal.HEALTH) < 0.5


def attached(training: Training) -> esper.Session:
    return esper.attach(training.model, training.optimizer, server="", sampling=[(0, 5, 5)])


def usual(session: esper.Session) -> bool:
    return len(session._steps._health._deviation._past) > FEWEST_FRAMES


def next_frame(training: Training, session: esper.Session) -> HealthFrame:
    before = session.frame()
    while session.frame() is before:
        training.run(1, session)
    frame = session.frame()
    assert frame is not None
    return frame
