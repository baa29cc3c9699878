"""The figures of the latency benchmark measure what they name."""

from __future__ import annotations

import pytest

from benchmarks.latency import decision, remedy_gates
from esper.remedies import list_remedies


@pytest.mark.parametrize("spans", [False, True])
def test_a_decision_is_measured_where_there_is_one(spans: bool) -> None:
    name = "decision_span" if spans else "decision"
    figure = decision(name, layers=6, repeats=2, spans=spans)
    assert len(figure.samples) == 2
    assert ("a span" in figure.note) is spans


def test_the_gates_of_every_remedy_are_measured() -> None:
    assert f"{len(list_remedies())} remedies" in remedy_gates(repeats=1).note
