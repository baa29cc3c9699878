"""The cost of a graft that spans layers is that of its span, not of its last layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from esper.contracts import RunSnapshot
from esper.contracts.spans import place_of
from esper.services.tamiyo.probation import cost_of


@pytest.fixture
def snapshot(
    make_snapshot: Callable[..., RunSnapshot], make_layer: Callable[..., Any]
) -> RunSnapshot:
    layers = (make_layer("in", order=0), make_layer("out", order=1, activation="relu"))
    return make_snapshot(layers=layers)


def test_a_span_costs_what_its_hidden_units_cost(snapshot: RunSnapshot) -> None:
    place = place_of(snapshot.layer, "out", "in")
    assert place is not None
    resource = {"blueprint": "widen_hidden", "config": {"hidden": 4}}
    assert cost_of(resource, place).parameters == 32 * 4 + 4 + 4 * 32
    assert place_of(snapshot.layer, "out") == snapshot.layers[1]


@pytest.mark.parametrize(("since", "layer"), [("gone", "out"), ("out", "in"), ("", "gone")])
def test_a_place_that_is_gone_is_none(snapshot: RunSnapshot, since: str, layer: str) -> None:
    assert place_of(snapshot.layer, layer, since) is None
