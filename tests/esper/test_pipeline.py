"""decide(): pure, deterministic, never automatic on what is unknown."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts import (
    SIGNALS,
    AdaptationDecision,
    AdaptationType,
    Decision,
    Declined,
    Experience,
    LayerHistory,
    RunMode,
    RunSnapshot,
    SafetyPolicy,
    Signal,
    ViolationRule,
)
from esper.contracts.codec import decode, encode
from esper.exceptions import CodecError
from esper.health import Features
from esper.pipeline import decide
from esper.policy import HeuristicPolicy, Proposals
from esper.replay import snapshot_from_wire, snapshot_to_wire

POLICY, LIMITS = HeuristicPolicy(), SafetyPolicy()
Make = Callable[..., Any]
Catalog = tuple[Any, ...]


def decided(snapshot: RunSnapshot, catalog: Catalog, **changes: Any) -> Decision | Declined:
    limits = replace(LIMITS, **changes)
    return decide(snapshot, POLICY, catalog, limits, np.random.default_rng(0))


class Fixed:
    """A policy that says what it was told to say."""

    name = "fixed-1"

    def __init__(self, *decisions: AdaptationDecision) -> None:
        self._decisions = decisions

    def propose(
        self, snapshot: RunSnapshot, features: Features, rng: np.random.Generator
    ) -> Proposals:
        return Proposals(self._decisions, ("Nothing else.",))


def test_a_lack_of_capacity_gives_a_cheap_graft_and_then_a_costlier_one(
    catalog: Catalog, make_snapshot: Make
) -> None:
    first = decided(make_snapshot(), catalog)
    assert isinstance(first, Decision)
    assert first.adaptation.adaptation_type is AdaptationType.ADD_EFFICIENCY
    assert any("too few to trust" in line for line in first.asks)

    history = {first.adaptation.layer_name: LayerHistory((first.blueprint,), False, 200)}
    second = decided(make_snapshot(history=history, last_adaptation_step=200), catalog)
    assert isinstance(second, Decision)
    assert second.adaptation.adaptation_type is AdaptationType.ADD_FFN
    for found in (first, second):
        weights = [reason.weight for reason in found.adaptation.reasons]
        assert sum(weights) == pytest.approx(found.adaptation.confidence)
        assert LIMITS.confidence_refuse <= found.adaptation.confidence < LIMITS.confidence_auto
        assert not found.automatic


def test_with_cases_of_its_kind_a_confident_graft_is_automatic(
    catalog: Catalog, make_snapshot: Make
) -> None:
    good = {slug: Experience(60, 0, 0.2) for slug in ("lora", "gain")}
    answer = decided(make_snapshot(experience=good), catalog)

    assert isinstance(answer, Decision)
    assert answer.adaptation.confidence >= LIMITS.confidence_auto
    assert answer.automatic


def test_equal_inputs_give_equal_decisions_in_any_catalogue_order(
    catalog: Catalog, make_snapshot: Make
) -> None:
    first = decided(make_snapshot(), catalog)
    shuffled = list(catalog)
    random.Random(1).shuffle(shuffled)
    second = decided(make_snapshot(), tuple(shuffled))

    assert isinstance(first, Decision)
    assert isinstance(second, Decision)
    for field in fields(Decision):
        if field.name != "evidence":
            assert getattr(second, field.name) == getattr(first, field.name), field.name
    assert list(map(repr, second.evidence.items())) == list(map(repr, first.evidence.items()))


def test_a_decision_can_be_replayed_from_its_stored_snapshot(
    catalog: Catalog, make_snapshot: Make
) -> None:
    snapshot = make_snapshot(
        experience={"lora": Experience(3, 1, 0.1), "gain": Experience()},
        history={"out": LayerHistory(("watch",), False, 10)},
        disabled_blueprints=frozenset({"attention"}),
    )
    stored = encode(snapshot_to_wire(snapshot))
    replayed = snapshot_from_wire(decode(stored))

    assert encode(snapshot_to_wire(replayed)) == stored
    assert repr(decided(replayed, catalog)) == repr(decided(snapshot, catalog))


def test_a_diverged_loss_survives_storage(make_snapshot: Make) -> None:
    loss = np.array([1.0, math.nan, math.inf])
    snapshot = make_snapshot(loss=loss, loss_steps=np.array([1, 2, 3]))
    replayed = snapshot_from_wire(decode(encode(snapshot_to_wire(snapshot))))

    np.testing.assert_array_equal(replayed.loss, loss)


def test_a_malformed_snapshot_is_refused(make_snapshot: Make) -> None:
    wire = snapshot_to_wire(make_snapshot())

    for broken in ({**wire, "mode": "wild"}, {**wire, "frames": [{}]}, {"run": "r"}):
        with pytest.raises(CodecError):
            snapshot_from_wire(broken)


def test_after_a_blocked_proposal_the_next_is_tried(catalog: Catalog, make_snapshot: Make) -> None:
    busy, free = (
        AdaptationDecision(layer, AdaptationType.ADD_EFFICIENCY, 0.9) for layer in ("in", "out")
    )
    snapshot = make_snapshot(history={"in": LayerHistory(in_flight=True)}, in_flight=1)
    rng = np.random.default_rng(0)

    chosen = decide(snapshot, Fixed(busy, free), catalog, LIMITS, rng)
    assert isinstance(chosen, Decision)
    assert chosen.adaptation.layer_name == "out"

    nothing = decide(snapshot, Fixed(busy), catalog, LIMITS, rng)
    assert isinstance(nothing, Declined)
    assert [check.rule for check in nothing.violations] == [ViolationRule.ONE_IN_FLIGHT]
    assert any("in progress" in reason for reason in nothing.reasons)


def test_an_unknown_layer_is_declined(catalog: Catalog, make_snapshot: Make) -> None:
    ghost = AdaptationDecision("ghost", AdaptationType.ADD_FFN, 0.9)
    answer = decide(make_snapshot(), Fixed(ghost), catalog, LIMITS, np.random.default_rng(0))

    assert isinstance(answer, Declined)
    assert "ghost" in answer.reasons[0]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"frozen": "kill switch"}, ViolationRule.FROZEN),
        ({"mode": RunMode.OBSERVE}, ViolationRule.RUN_MODE),
        ({"adaptations_today": 20}, ViolationRule.DAILY_BUDGET),
        ({"age_seconds": 121.0}, ViolationRule.EVIDENCE),
        ({"age_seconds": math.nan}, ViolationRule.EVIDENCE),
    ],
)
def test_a_closed_gate_declines_with_its_rule(
    changes: dict[str, Any], rule: ViolationRule, catalog: Catalog, make_snapshot: Make
) -> None:
    answer = decided(make_snapshot(**changes), catalog)

    assert isinstance(answer, Declined)
    assert rule in {check.rule for check in answer.violations}


def test_a_supervised_run_always_asks(catalog: Catalog, make_snapshot: Make) -> None:
    answer = decided(make_snapshot(mode=RunMode.SUPERVISED), catalog)

    assert isinstance(answer, Decision)
    assert not answer.automatic


def test_bad_experience_lowers_the_confidence_below_the_bands(
    catalog: Catalog, make_snapshot: Make
) -> None:
    bad = {slug: Experience(0, 40, -0.2) for slug in ("lora", "gain", "ffn", "ffn_gated")}
    answer = decided(make_snapshot(experience=bad), catalog)

    assert isinstance(answer, Declined)
    assert ViolationRule.CONFIDENCE in {check.rule for check in answer.violations}


def test_an_unknown_confidence_is_told_by_cases_and_few_cases_ask(
    catalog: Catalog, make_snapshot: Make
) -> None:
    unsure = AdaptationDecision("mid", AdaptationType.ADD_EFFICIENCY, math.nan)
    answer = decide(make_snapshot(), Fixed(unsure), catalog, LIMITS, np.random.default_rng(0))

    assert isinstance(answer, Decision)
    assert not answer.automatic


@settings(max_examples=60, deadline=None)
@given(
    holes=st.sets(st.sampled_from([*SIGNALS]), max_size=len(SIGNALS)),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    losses=st.sampled_from(["as they are", "all bad", "none"]),
)
def test_unknown_numbers_always_need_a_person(
    holes: set[Signal], bad: float, losses: str, catalog: Catalog, make_snapshot: Make
) -> None:
    signals = {name: dict.fromkeys(holes, bad) for name in ("in", "mid", "out")}
    snapshot = make_snapshot(signals=signals)
    if losses == "all bad":
        snapshot = replace(snapshot, loss=np.full(len(snapshot.loss), bad))
    if losses == "none":
        snapshot = replace(snapshot, loss=np.empty(0), loss_steps=np.empty(0, dtype=np.int64))
    answer = decided(snapshot, catalog)

    if isinstance(answer, Decision) and answer.automatic and answer.risk != "none":
        for name in ("loss", "grad_norm", "weight_norm"):
            assert math.isfinite(answer.evidence[name])
        assert losses == "as they are"


ODD = np.array([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-38, 1e-3, 1.0, 50.0, 3e38])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 80))
def test_any_frame_and_any_loss_gets_an_answer_with_reasons(
    seed: int, length: int, catalog: Catalog, make_snapshot: Make
) -> None:
    rng = np.random.default_rng(seed)
    signals = {
        name: dict(zip(SIGNALS, rng.choice(ODD, len(SIGNALS)), strict=True))
        for name in ("in", "mid", "out")
    }
    steps = 900 + np.arange(length, dtype=np.int64)
    loss = rng.choice(ODD if seed % 2 else ODD[5:], length)
    snapshot = make_snapshot(signals=signals, loss=loss, loss_steps=steps)
    answer = decided(snapshot, catalog)

    if isinstance(answer, Declined):
        assert answer.reasons
    else:
        assert 0.0 <= answer.adaptation.confidence <= 1.0
        assert answer.adaptation.reasons


def test_the_evidence_holds_the_layer_the_run_and_the_loss(
    catalog: Catalog, make_snapshot: Make
) -> None:
    answer = decided(make_snapshot(), catalog)

    assert isinstance(answer, Decision)
    assert answer.evidence["weight_norm"] == pytest.approx(4.0)
    assert answer.evidence["weight_norm_median"] == pytest.approx(4.0)
    assert answer.evidence["loss"] == pytest.approx(1.0, abs=0.05)
    assert math.isnan(answer.evidence["graft_grad_share"])
    assert answer.policy == "heuristic-3"
