"""Each rule of the heuristic proposes when it should, and only then."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from esper.contracts import AdaptationType, LayerHistory, RunSnapshot, Signal
from esper.health import extract_features
from esper.policy import HeuristicPolicy, Proposals

Make = Callable[..., Any]
TYPES = {
    "lora": AdaptationType.ADD_EFFICIENCY,
    "ffn": AdaptationType.ADD_FFN,
    "attention": AdaptationType.ADD_ATTENTION,
    "watch": AdaptationType.ADD_DIAGNOSTIC,
}
UNSEEN = dict.fromkeys(
    (Signal.ACT_MEAN, Signal.ACT_STD, Signal.DEAD_FRACTION, Signal.SATURATION), math.nan
)
STEPS = np.arange(1, 1001, dtype=np.int64)


def proposals(snapshot: RunSnapshot) -> Proposals:
    return HeuristicPolicy().propose(snapshot, extract_features(snapshot, TYPES))


def kinds(snapshot: RunSnapshot) -> list[tuple[str, str]]:
    return [(d.layer_name, str(d.adaptation_type)) for d in proposals(snapshot)]


def noisy(loss: Any, noise: float) -> Any:
    return loss + np.random.default_rng(2).normal(0, noise, len(STEPS))


LOSSES = {
    "flat far above zero": noisy(1.0 + 2.0 * np.exp(-STEPS / 60.0), 0.02),
    "still falls": noisy(3.0 * STEPS**-0.35, 0.01),
    "solved": noisy(0.05 + 3.0 * np.exp(-STEPS / 50.0), 0.001),
    "learnt nothing": noisy(np.full(len(STEPS), 2.3), 0.02),
    "jumps": np.where(STEPS > 997, 4.0, noisy(3.0 * STEPS**-0.35, 0.01)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize(
    "sick",
    [{}, {"mid": {Signal.DEAD_FRACTION: 0.8}}, {"mid": {**UNSEEN, Signal.GRAD_NORM: 1e-9}}],
    ids=["healthy", "dead units", "unmeasured"],
)
def test_nothing_is_grafted_until_the_diagnosis_says_capacity(
    loss: Any, sick: dict[str, dict[Signal, float]], make_snapshot: Make
) -> None:
    other = replace(make_snapshot().findings[0], slug="dying_relu")
    for findings in ((), (other,)):
        answer = proposals(make_snapshot(loss=loss, signals=sick, findings=findings))
        assert not answer.decisions
        (reason,) = answer.reasons
        assert "lacks capacity" in reason
        assert ("dying_relu" in reason) == bool(findings)


def test_the_finding_that_the_run_lacks_capacity_is_answered_and_cited(make_snapshot: Make) -> None:
    decision = proposals(make_snapshot()).decisions[0]

    assert decision.reasons[0].signal == "capacity"
    assert decision.reasons[0].text == make_snapshot().findings[0].observed


def test_the_layer_that_the_finding_names_comes_first(make_snapshot: Make) -> None:
    named = replace(make_snapshot().findings[0], layer="out")
    signals = {"mid": {Signal.STABLE_RANK: 0.9}}

    assert kinds(make_snapshot(signals=signals, findings=(named,)))[0][0] == "out"


def test_the_layer_that_uses_up_its_rank_comes_first(make_snapshot: Make) -> None:
    signals = {"mid": {Signal.STABLE_RANK: 0.9}, "in": {Signal.STABLE_RANK: 0.05}}

    assert kinds(make_snapshot(signals=signals))[0] == ("mid", "add_efficiency")


def test_the_narrow_layer_comes_before_the_wide_one(make_snapshot: Make, make_layer: Make) -> None:
    layers = (make_layer("wide"), make_layer("slim", features_in=4, features_out=32))

    assert kinds(make_snapshot(layers=layers))[0] == ("slim", "add_efficiency")


def test_attention_needs_a_sequence(make_snapshot: Make, make_layer: Make) -> None:
    history = {"seq": LayerHistory(("lora", "ffn")), "flat": LayerHistory(("lora", "ffn"))}
    layers = (make_layer("flat"), make_layer("seq", in_shape=(8, 16, 32), out_shape=(8, 16, 32)))
    found = kinds(make_snapshot(layers=layers, history=history))

    assert ("seq", "add_attention") in found
    assert ("flat", "add_attention") not in found


def test_no_capacity_is_added_while_another_adaptation_is_in_progress(make_snapshot: Make) -> None:
    answer = proposals(make_snapshot(in_flight=1))

    assert not answer.decisions
    assert any("in progress" in reason for reason in answer.reasons)


def test_after_an_adaptation_the_curve_must_be_seen_again(make_snapshot: Make) -> None:
    assert kinds(make_snapshot(last_adaptation_step=980)) == []
    assert kinds(make_snapshot(last_adaptation_step=200)) != []


def test_a_rolled_back_layer_comes_later(make_snapshot: Make) -> None:
    full = {name: {Signal.STABLE_RANK: 0.9} for name in ("in", "mid", "out")}
    full["in"][Signal.GRAD_NORM] = 10.0
    fresh = proposals(make_snapshot(signals=full))
    layer = fresh.decisions[0].layer_name
    history = {layer: LayerHistory(last_rolled_back=True)}
    burnt = proposals(make_snapshot(signals=full, history=history))

    assert burnt.decisions[0].layer_name != layer


@pytest.mark.parametrize("changes", [{"graftable": False}, {"trainable": False}])
def test_a_layer_that_may_not_be_changed_is_never_proposed(
    changes: dict[str, bool], make_snapshot: Make, make_layer: Make
) -> None:
    layers = (make_layer("free"), make_layer("closed", **changes))

    assert {layer for layer, _ in kinds(make_snapshot(layers=layers))} == {"free"}


def test_no_proposal_is_made_twice(make_snapshot: Make) -> None:
    found = kinds(make_snapshot(signals={"mid": {Signal.DEAD_FRACTION: 0.9}}))

    assert len(found) == len(set(found))
