"""What another safety policy would have decided on past cases, before anybody agrees to it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from apps.adaptations.history import category_cases
from apps.adaptations.models import RECOVERED, Adaptation
from esper.constraints import GateInputs
from esper.constraints.gates import check_blueprint
from esper.contracts import AdaptationState, Risk, RunMode, SafetyPolicy

CASES = 300  # the newest
ALONE, ASKS, REFUSED = "alone", "asks", "refused"
_ENDS = {
    AdaptationState.KEPT: "kept",
    AdaptationState.ROLLED_BACK: "taken_out",
    AdaptationState.REVERTED: "taken_out",
}


def backtest(before: SafetyPolicy, after: SafetyPolicy) -> dict[str, Any]:
    """Past grafts by what each policy decides on them, and how those ended that it decides anew.

    Cost, risk and confidence are judged as they were at the time; cooldowns, evidence and the
    run's mode are not, because they depended on the moment.
    """
    rows = Adaptation.objects.filter(remedy="", blueprint__isnull=False).exclude(policy=RECOVERED)
    past = list(rows.select_related("run", "blueprint").order_by("-id")[:CASES])
    cases = {category: category_cases(category) for category in {_category(row) for row in past}}
    counts = {"before": Counter[str](), "after": Counter[str]()}
    newly: dict[str, Counter[str]] = {ALONE: Counter(), ASKS: Counter(), REFUSED: Counter()}
    for row in past:
        inputs = _inputs(row, cases[_category(row)])
        old, new = _answer(inputs, before), _answer(inputs, after)
        counts["before"][old] += 1
        counts["after"][new] += 1
        if old != new:
            newly[new][_ENDS.get(AdaptationState(row.state), "not_judged")] += 1
    return {
        "cases": len(past),
        "before": dict(counts["before"]),
        "after": dict(counts["after"]),
        "newly": {answer: dict(ends) for answer, ends in newly.items() if ends},
    }


def _category(row: Adaptation) -> str:
    return row.blueprint.category if row.blueprint is not None else ""


def _inputs(row: Adaptation, cases: int) -> GateInputs:
    return GateInputs(
        mode=RunMode.AUTOMATIC,
        step=row.proposed_step,
        model_parameters=row.run.model_parameters,
        new_parameters=row.forecast_parameters,
        memory_mib=_number(row.forecast_memory_mib),
        latency_ms=_number(row.forecast_latency_ms),
        risk=Risk(row.risk),
        category_cases=cases,
        age_seconds=0.0,
        confidence=_number(row.confidence),
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _answer(inputs: GateInputs, policy: SafetyPolicy) -> str:
    checks = check_blueprint(inputs, policy)
    if any(check.blocks for check in checks):
        return REFUSED
    return ASKS if any(check.asks for check in checks) else ALONE
