"""Plans of a run: what excludes what, what the limits hold, and what the gates block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.latency import flat_run
from esper import blueprints
from esper.contracts import (
    Declined,
    LayerHistory,
    LayerInfo,
    Plan,
    RunMode,
    RunSnapshot,
    SafetyPolicy,
)
from esper.contracts.decisions import Decision
from esper.planning import plan_run
from esper.policy import HeuristicPolicy
from esper.selection import BlueprintSelector

LIMITS = SafetyPolicy(max_plan_changes=3)
SELECTOR = BlueprintSelector(blueprints.list_blueprints())


def planned(
    snapshot: RunSnapshot, limits: SafetyPolicy = LIMITS, selector: BlueprintSelector = SELECTOR
) -> Plan:
    found = plan_run(snapshot, HeuristicPolicy(), selector, limits, np.random.default_rng(0))
    assert isinstance(found, Plan), found
    return found


def spans_of(plan: Plan, layers: tuple[LayerInfo, ...]) -> list[set[int]]:
    at = {layer.name: place for place, layer in enumerate(layers)}
    ends = [(m.adaptation.since or m.adaptation.layer_name, m.adaptation.layer_name)
            for m in plan.members]  # fmt: skip
    return [set(range(at[first], at[last] + 1)) for first, last in ends]


def cost(plan: Plan) -> tuple[int, float, float]:
    forecasts = [member.forecast for member in plan.members]
    return (
        sum(f.parameters for f in forecasts),
        sum(f.memory_mib for f in forecasts),
        sum(f.latency_ms for f in forecasts),
    )


def test_spans_of_a_plan_do_not_meet_and_the_narrowest_comes_first() -> None:
    run = flat_run(8, spans=True)
    plan = planned(run)
    assert len(plan) == 3
    assert plan.members[0].adaptation.layer_name == "layer4"  # which the finding names
    covered = spans_of(plan, run.layers)
    assert sum(map(len, covered)) == len(set().union(*covered))
    assert any("overlaps" in reason for reason in plan.reasons)


@pytest.mark.parametrize(
    "limits",
    [
        replace(LIMITS, max_added_parameters_ratio=0.15),
        replace(LIMITS, max_memory_mib=1.2),
        replace(LIMITS, max_latency_ms=6.0),
        replace(LIMITS, max_plan_changes=2),
    ],
    ids=["parameters", "memory", "latency", "changes"],
)
def test_the_sum_of_a_plan_keeps_the_limits_of_one_change(limits: SafetyPolicy) -> None:
    run = flat_run(8, spans=True)
    plan = planned(run, limits)
    parameters, memory, latency = cost(plan)
    assert parameters <= limits.max_added_parameters_ratio * run.model_parameters
    assert memory <= limits.max_memory_mib
    assert latency <= limits.max_latency_ms
    assert len(plan) <= limits.max_plan_changes
    assert cost(planned(run)) != (parameters, memory, latency)  # the limit is felt


def test_each_member_passes_every_gate_with_those_before_it_counted() -> None:
    run = replace(flat_run(8, spans=True), adaptations_today=LIMITS.max_adaptations_per_day - 2)
    plan = planned(run)
    assert len(plan) == 2
    assert all(not check.blocks for member in plan.members for check in member.checks)
    added = [c.observed for m in plan.members for c in m.checks if c.rule == "parameter_budget"]
    first, second = (int(text.replace(",", "")) for text in added)
    assert second == first + plan.members[1].forecast.parameters


def test_a_plan_always_asks_a_person() -> None:
    sure = replace(LIMITS, confidence_auto=0.0, confidence_refuse=0.0, min_cases_for_auto=0)
    asks = planned(flat_run(8, spans=True), sure).asks
    assert any("a person decides on the whole" in line for line in asks)


def test_a_span_beside_a_graft_is_left_out_because_it_could_not_be_exported() -> None:
    run = flat_run(8, spans=True)
    carrying = {"layer3": LayerHistory(grafts=("proj_lora_64",))}
    plan = planned(replace(run, history=carrying))
    ends = {m.adaptation.since for m in plan.members} | {
        m.adaptation.layer_name for m in plan.members if m.adaptation.since
    }
    assert "layer3" not in ends


def test_equal_inputs_give_equal_plans_in_any_order_of_the_catalogue() -> None:
    run = flat_run(8, spans=True)
    turned = BlueprintSelector(blueprints.list_blueprints()[::-1])
    assert chosen(planned(run)) == chosen(planned(run, selector=turned))


def chosen(plan: Plan) -> list[tuple[str, str, object]]:
    def of(member: Decision) -> tuple[str, str, object]:
        return (member.adaptation.layer_name, member.blueprint, sorted(member.config.items()))

    return [of(member) for member in plan.members]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"findings": ()}, "No open finding"),
        ({"mode": RunMode.OBSERVE}, "0 change fits"),
        ({"in_flight": 2}, "in progress"),
    ],
    ids=["healthy", "observed", "in flight"],
)
def test_there_is_no_plan_and_the_reason_is_told(change: dict[str, object], words: str) -> None:
    run = replace(flat_run(8, spans=True), **change)  # type: ignore[arg-type]
    found = plan_run(run, HeuristicPolicy(), SELECTOR, LIMITS, np.random.default_rng(0))
    assert isinstance(found, Declined)
    assert any(words in reason for reason in found.reasons)
