"""A caller's limits, and the policy's limits on measured cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from esper.constraints import check_measured, within
from esper.contracts import Certificate, CostForecast, SafetyPolicy, ViolationRule
from esper.exceptions import ConfigurationError

COST = CostForecast(parameters=10, flops=20, memory_mib=1.0, latency_ms=2.0)
MEASURED = Certificate(
    max_abs_diff=0.0,
    tolerance=0.0,
    preserving=True,
    live=True,
    rng_neutral=True,
    parameters=1,
    parameters_declared=1,
    memory_mib=1.0,
    latency_ms=2.0,
)


def test_a_megabyte_is_smaller_than_a_mebibyte() -> None:
    assert within({"max_memory_mb": 1.048576}, COST)[0].passed
    assert within({"max_memory_mb": 1.0485}, COST)[0].blocks


def test_latency_passes_at_its_limit() -> None:
    assert within({"max_latency_ms": 2.0}, COST)[0].passed
    assert within({"max_latency_ms": 1.999}, COST)[0].blocks


def test_unknown_latency_asks_and_unknown_memory_blocks() -> None:
    unknown = replace(COST, memory_mib=math.nan, latency_ms=math.nan)
    memory, latency = within({"max_memory_mb": 1.0, "max_latency_ms": 1.0}, unknown)

    assert memory.rule is ViolationRule.MEMORY
    assert memory.blocks
    assert latency.asks


@pytest.mark.parametrize("limits", [{"max_memory": 1}, {"max_latency_ms": math.nan}])
def test_a_limit_that_makes_no_sense_is_an_error(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        within(limits, COST)


def test_measured_cost_is_held_to_the_policy() -> None:
    policy = SafetyPolicy(max_memory_mib=1.0, max_latency_ms=2.0)

    assert all(check.passed for check in check_measured(MEASURED, policy))
    slow = check_measured(replace(MEASURED, latency_ms=2.01), policy)
    assert [check.rule for check in slow if check.blocks] == [ViolationRule.LATENCY]


def test_what_was_not_measured_is_not_dispatched() -> None:
    unmeasured = replace(MEASURED, latency_ms=math.nan, memory_mib=math.nan)

    blocked = [check.rule for check in check_measured(unmeasured, SafetyPolicy()) if check.blocks]
    assert blocked == [ViolationRule.MEMORY, ViolationRule.LATENCY]


def test_a_failed_certificate_blocks_with_its_sentences() -> None:
    failed = replace(MEASURED, failures=("the output changes",))
    check = check_measured(failed, SafetyPolicy())[0]

    assert check.blocks
    assert "the output changes" in check.text
