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


def falling(make_snapshot: Make, **changes: Any) -> RunSnapshot:
    noise = np.random.default_rng(1).normal(1.0, 0.03, len(STEPS))
    loss = 3.0 * STEPS**-0.35 * noise
    snapshot: RunSnapshot = make_snapshot(loss=loss, loss_steps=STEPS, **changes)
    return snapshot


def test_a_healthy_run_whose_loss_falls_is_left_alone_with_reasons(make_snapshot: Make) -> None:
    answer = proposals(falling(make_snapshot))

    assert not answer.decisions
    assert any("still falls" in reason for reason in answer.reasons)


def test_a_solved_run_is_left_alone(make_snapshot: Make) -> None:
    noise = np.random.default_rng(2).normal(0, 0.001, len(STEPS))
    loss = 0.05 + 3.0 * np.exp(-STEPS / 50.0) + noise

    assert kinds(make_snapshot(loss=loss, loss_steps=STEPS)) == []


def test_a_run_that_never_learnt_anything_gets_no_more_capacity(make_snapshot: Make) -> None:
    loss = np.random.default_rng(3).normal(2.3, 0.02, len(STEPS))

    assert kinds(make_snapshot(loss=loss, loss_steps=STEPS)) == []
    # The same flat stretch late in a run says nothing about where it began.
    assert kinds(make_snapshot(loss=loss, loss_steps=STEPS + 9000, step=10_000)) != []


def test_a_young_run_is_left_alone(make_snapshot: Make) -> None:
    assert kinds(make_snapshot(step=400)) == []


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


def test_a_rolled_back_layer_comes_later_and_with_less_confidence(make_snapshot: Make) -> None:
    full = {name: {Signal.STABLE_RANK: 0.9} for name in ("in", "mid", "out")}
    full["in"][Signal.GRAD_NORM] = 10.0
    fresh = proposals(make_snapshot(signals=full))
    layer = fresh.decisions[0].layer_name
    history = {layer: LayerHistory(last_rolled_back=True)}
    burnt = proposals(make_snapshot(signals=full, history=history))
    confidence = {d.layer_name: d.confidence for d in reversed(burnt.decisions)}

    assert burnt.decisions[0].layer_name != layer
    assert confidence[layer] < fresh.decisions[0].confidence


def test_an_unhealthy_layer_with_unknown_activations_is_measured(make_snapshot: Make) -> None:
    sick = {"mid": {**UNSEEN, Signal.GRAD_NORM: 1e-9}}
    decision = proposals(falling(make_snapshot, signals=sick)).decisions[0]

    assert (decision.layer_name, decision.adaptation_type) == (
        "mid",
        AdaptationType.ADD_DIAGNOSTIC,
    )
    assert decision.confidence >= 0.75


def test_a_layer_that_is_watched_already_is_not_watched_twice(make_snapshot: Make) -> None:
    sick = {"mid": {**UNSEEN, Signal.GRAD_NORM: 1e-9}}
    history = {"mid": LayerHistory(("watch",))}

    assert kinds(falling(make_snapshot, signals=sick, history=history)) == []


def test_dead_units_beside_a_flat_loss_get_a_path_around_them(make_snapshot: Make) -> None:
    dead = {"mid": {Signal.DEAD_FRACTION: 0.8}}

    assert kinds(make_snapshot(signals=dead))[0] == ("mid", "add_ffn")
    assert kinds(falling(make_snapshot, signals=dead)) == []


def test_a_jump_of_the_loss_limits_the_layer_that_changes_most(make_snapshot: Make) -> None:
    snapshot = falling(make_snapshot, signals={"out": {Signal.UPDATE_RATIO: 0.02}})
    loss = snapshot.loss.copy()
    loss[-3:] *= 4.0
    decision = proposals(replace(snapshot, loss=loss)).decisions[0]

    assert decision.layer_name == "out"
    assert decision.adaptation_type is AdaptationType.ADD_DIAGNOSTIC
    assert decision.urgency >= 0.5


def test_a_single_outlier_of_the_loss_is_no_jump(make_snapshot: Make) -> None:
    snapshot = falling(make_snapshot)
    loss = snapshot.loss.copy()
    loss[-1] *= 4.0

    assert kinds(replace(snapshot, loss=loss)) == []


@pytest.mark.parametrize("changes", [{"graftable": False}, {"trainable": False}])
def test_a_layer_that_may_not_be_changed_is_never_proposed(
    changes: dict[str, bool], make_snapshot: Make, make_layer: Make
) -> None:
    layers = (make_layer("free"), make_layer("closed", **changes))

    assert {layer for layer, _ in kinds(make_snapshot(layers=layers))} == {"free"}


def test_no_proposal_is_made_twice(make_snapshot: Make) -> None:
    found = kinds(make_snapshot(signals={"mid": {Signal.DEAD_FRACTION: 0.9}}))

    assert len(found) == len(set(found))
