"""Every gate lets the last allowed value through, and stops the first one beyond it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.constraints import (
    GateInputs,
    check_blueprint,
    check_gates,
    check_run,
    gate_inputs,
    required_evidence,
)
from esper.constraints.gates import check_confidence
from esper.contracts import (
    AdaptationDecision,
    AdaptationType,
    CostForecast,
    LayerHistory,
    Risk,
    RunMode,
    RunSnapshot,
    SafetyPolicy,
    ViolationRule,
)

POLICY = SafetyPolicy()
OPEN = GateInputs(
    mode=RunMode.AUTOMATIC,
    step=10_000,
    model_parameters=100_000,
    memory_mib=1.0,
    latency_ms=0.1,
    risk=Risk.LOW,
    age_seconds=1.0,
    confidence=0.9,
)
# (what changes, last value that passes, first that does not, rule, hard)
LIMITS = [
    ("frozen", "", "kill switch", ViolationRule.FROZEN, True),
    ("mode", RunMode.AUTOMATIC, RunMode.SUPERVISED, ViolationRule.RUN_MODE, False),
    ("mode", RunMode.AUTOMATIC, RunMode.OBSERVE, ViolationRule.RUN_MODE, True),
    ("layer_in_flight", False, True, ViolationRule.ONE_IN_FLIGHT, True),
    ("run_in_flight", 1, 2, ViolationRule.ONE_IN_FLIGHT, True),
    ("layer_last_step", 9_600, 9_601, ViolationRule.COOLDOWN, True),
    ("run_last_step", 9_900, 9_901, ViolationRule.COOLDOWN, True),
    ("adaptations_today", 19, 20, ViolationRule.DAILY_BUDGET, True),
    ("new_parameters", 200_000, 200_001, ViolationRule.PARAMETER_BUDGET, True),
    ("added_parameters", 200_000, 200_001, ViolationRule.PARAMETER_BUDGET, True),
    ("memory_mib", 1024.0, 1024.1, ViolationRule.MEMORY, True),
    ("latency_ms", 10.0, 10.01, ViolationRule.LATENCY, True),
    ("latency_ms", 10.0, math.nan, ViolationRule.LATENCY, False),
    ("memory_mib", 1024.0, math.nan, ViolationRule.MEMORY, True),
    ("risk", Risk.LOW, Risk.MEDIUM, ViolationRule.RISK_CLASS, False),
    ("missing_evidence", (), ("grad_norm",), ViolationRule.EVIDENCE, True),
    ("age_seconds", 120.0, 120.5, ViolationRule.EVIDENCE, True),
    ("age_seconds", 120.0, math.nan, ViolationRule.EVIDENCE, True),
    ("confidence", 0.75, 0.7499, ViolationRule.CONFIDENCE, False),
    ("confidence", 0.75, math.nan, ViolationRule.CONFIDENCE, False),
    ("confidence", 0.75, 0.0499, ViolationRule.CONFIDENCE, True),
]


def changed(inputs: GateInputs, **changes: Any) -> GateInputs:
    return replace(inputs, **changes)


def failed(inputs: GateInputs, policy: SafetyPolicy = POLICY) -> list[tuple[ViolationRule, bool]]:
    checks = check_gates(inputs, policy)
    return [(check.rule, check.hard) for check in checks if check.passed is not True]


@pytest.mark.parametrize(("name", "last", "beyond", "rule", "hard"), LIMITS)
def test_gate_passes_at_its_limit_and_not_beyond(
    name: str, last: object, beyond: object, rule: ViolationRule, hard: bool
) -> None:
    assert failed(changed(OPEN, **{name: last})) == []
    assert failed(changed(OPEN, **{name: beyond})) == [(rule, hard)]


def test_gates_come_in_the_order_of_the_design() -> None:
    rules = [check.rule for check in check_gates(OPEN, POLICY)]

    assert list(dict.fromkeys(rules)) == [
        ViolationRule.FROZEN,
        ViolationRule.RUN_MODE,
        ViolationRule.ONE_IN_FLIGHT,
        ViolationRule.COOLDOWN,
        ViolationRule.DAILY_BUDGET,
        ViolationRule.PARAMETER_BUDGET,
        ViolationRule.MEMORY,
        ViolationRule.LATENCY,
        ViolationRule.RISK_CLASS,
        ViolationRule.EVIDENCE,
        ViolationRule.CONFIDENCE,
    ]
    assert check_run(OPEN, POLICY) + check_blueprint(OPEN, POLICY) == check_gates(OPEN, POLICY)


@pytest.mark.parametrize("who", ["layer", "run"])
def test_cooldown_is_longer_after_a_rollback(who: str) -> None:
    steps = POLICY.cooldown_layer_steps if who == "layer" else POLICY.cooldown_run_steps
    rolled_back = changed(OPEN, **{f"{who}_rolled_back": True})

    assert failed(changed(rolled_back, **{f"{who}_last_step": 10_000 - 2 * steps})) == []
    assert failed(changed(rolled_back, **{f"{who}_last_step": 10_001 - 2 * steps})) == [
        (ViolationRule.COOLDOWN, True)
    ]


def test_medium_risk_needs_no_person_only_with_enough_closed_cases() -> None:
    policy = SafetyPolicy(auto_max_risk=Risk.MEDIUM)
    medium = changed(OPEN, risk=Risk.MEDIUM)

    assert failed(changed(medium, category_cases=20), policy) == []
    assert failed(changed(medium, category_cases=19), policy) == [(ViolationRule.RISK_CLASS, False)]


def test_what_changes_the_function_always_asks() -> None:
    policy = SafetyPolicy(auto_max_risk=Risk.HIGH)
    high = changed(OPEN, risk=Risk.HIGH, category_cases=10_000, confidence=1.0)

    assert failed(high, policy) == [(ViolationRule.RISK_CLASS, False)]


def test_the_defaults_of_the_inputs_always_need_a_person() -> None:
    checks = check_gates(GateInputs(mode=RunMode.AUTOMATIC, step=0), POLICY)

    assert any(check.blocks for check in checks)


NUMBERS = [f.name for f in fields(GateInputs) if f.type == "float"]


@given(broken=st.sets(st.sampled_from(NUMBERS), min_size=1))
def test_no_unknown_number_passes_all_gates(broken: set[str]) -> None:
    inputs = changed(OPEN, **dict.fromkeys(broken, math.nan))

    assert failed(inputs)


@given(
    confidence=st.floats(0, 1),
    refuse=st.floats(0, 1),
    auto=st.floats(0, 1),
)
def test_confidence_bands_are_refuse_ask_auto(
    confidence: float, refuse: float, auto: float
) -> None:
    refuse, auto = sorted((refuse, auto))
    policy = SafetyPolicy(confidence_refuse=refuse, confidence_auto=auto)
    check = check_gates(changed(OPEN, confidence=confidence), policy)[-1]

    band = "refuse" if check.blocks else "ask" if check.asks else "auto"
    assert band == ("auto" if confidence >= auto else "ask" if confidence >= refuse else "refuse")


@pytest.mark.parametrize("confidence", [math.nan, math.inf, -math.inf])
def test_confidence_that_is_not_finite_is_unknown_and_asks(confidence: float) -> None:
    check = check_confidence(changed(OPEN, confidence=confidence), POLICY)
    assert (check.passed, check.hard, check.observed) == (None, False, "unknown")


def test_a_snapshot_is_read_into_the_inputs(make_snapshot: Callable[..., RunSnapshot]) -> None:
    snapshot = make_snapshot(
        frozen="weekend",
        in_flight=1,
        last_adaptation_step=700,
        adaptations_today=3,
        added_parameters=5,
        history={"mid": LayerHistory(("lora",), True, 700, True)},
    )
    decision = AdaptationDecision("mid", AdaptationType.ADD_FFN, 0.8)
    inputs = gate_inputs(
        snapshot, decision, CostForecast(7, 9, 0.5, 0.25), Risk.MEDIUM, category_cases=4
    )

    assert inputs == GateInputs(
        mode=RunMode.AUTOMATIC,
        step=1000,
        frozen="weekend",
        layer_in_flight=True,
        run_in_flight=1,
        layer_last_step=700,
        layer_rolled_back=True,
        run_last_step=700,
        run_rolled_back=True,
        adaptations_today=3,
        model_parameters=3168,
        added_parameters=5,
        new_parameters=7,
        memory_mib=0.5,
        latency_ms=0.25,
        risk=Risk.MEDIUM,
        category_cases=4,
        age_seconds=1.0,
        confidence=0.8,
    )


def test_only_observing_grafts_may_lack_evidence() -> None:
    assert required_evidence(Risk.NONE) == ()
    assert all("loss" in required_evidence(risk) for risk in Risk if risk is not Risk.NONE)
