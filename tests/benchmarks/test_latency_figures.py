"""The figures of the latency benchmark measure what they name."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import end_to_end
from benchmarks.latency import decision, remedy_gates
from esper.contracts import HealthFrame, RunMode, RunSnapshot
from esper.health import extract_features
from esper.policy import HeuristicPolicy
from esper.remedies import list_remedies


@pytest.mark.parametrize("spans", [False, True])
def test_a_decision_is_measured_where_there_is_one(spans: bool) -> None:
    name = "decision_span" if spans else "decision"
    figure = decision(name, layers=6, repeats=2, spans=spans)
    assert len(figure.samples) == 2
    assert ("a span" in figure.note) is spans


def test_the_gates_of_every_remedy_are_measured() -> None:
    assert f"{len(list_remedies())} remedies" in remedy_gates(repeats=1).note


def test_what_the_end_to_end_run_reports_asks_for_a_graft() -> None:
    layers = end_to_end.trace_model(end_to_end.build_model())
    names = tuple(layer.name for layer in layers)
    snapshot = RunSnapshot(
        run="run_1",
        epoch=1,
        mode=RunMode.AUTOMATIC,
        step=end_to_end.STEPS,
        layers=layers,
        frames=(HealthFrame(end_to_end.STEPS, 0.0, names, end_to_end.signals(len(layers))),),
        loss_steps=np.arange(end_to_end.STEPS),
        loss=end_to_end.losses(np.random.default_rng(0)),
        model_parameters=10_000,
        findings=(end_to_end.LACKS_CAPACITY,),
    )
    proposed = HeuristicPolicy().propose(snapshot, extract_features(snapshot)).decisions
    assert proposed
    assert not any(decision.since for decision in proposed)  # its trainer applies no span
