"""Which of two thresholds is the stricter one, and the strictest of several safety policies.

A policy for all runs, one for a project and one for a run may be in force together: of each
threshold the strictest value counts, so no narrower policy can allow more than a wider one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from esper.contracts import Risk, SafetyPolicy
from esper.contracts.enums import risk_rank

# Thresholds of which more is stricter: less is done, or with more evidence. A test compares both
# sets with the fields of SafetyPolicy.
MORE = frozenset(
    {
        "confidence_refuse", "confidence_auto", "min_cases_for_auto", "cooldown_layer_steps",
        "cooldown_run_steps", "cooldown_rollback_factor", "cooldown_refused_seconds",
        "approvals_for_high_risk", "maturity_steps", "min_gain_ratio",
    }
)  # fmt: skip
LESS = frozenset(
    {
        "auto_max_risk", "max_in_flight_per_run", "max_plan_changes", "max_adaptations_per_day",
        "max_added_parameters_ratio", "max_memory_mib", "max_latency_ms",
        "evidence_max_age_seconds", "approval_timeout_seconds", "dispatch_timeout_seconds",
        "probation_steps", "probation_looks", "probation_cost_ratio", "probation_timeout_seconds",
        "max_loss_increase_ratio", "error_budget_ratio",
    }
)  # fmt: skip


def is_stricter(name: str, value: Any, than: Any) -> bool:
    """Whether a threshold's value allows less than another one."""
    one, other = _number(value), _number(than)
    return one > other if name in MORE else one < other


def laxer(before: SafetyPolicy, after: SafetyPolicy) -> tuple[str, ...]:
    """Thresholds that allow more in ``after`` than in ``before``."""
    return tuple(
        name
        for name in sorted(MORE | LESS)
        if is_stricter(name, getattr(before, name), getattr(after, name))
    )


def strictest(policies: Mapping[str, SafetyPolicy]) -> tuple[SafetyPolicy, dict[str, str]]:
    """The strictest value of each threshold, and whose it is.

    Args:
        policies: by name, the widest first, which is named where several are equal.

    Returns:
        The policy, with name and version of the widest, and threshold -> name.
    """
    names = list(policies)
    found, source = policies[names[0]], dict.fromkeys(sorted(MORE | LESS), names[0])
    for name in names[1:]:
        for threshold in source:
            value = getattr(policies[name], threshold)
            if is_stricter(threshold, value, getattr(found, threshold)):
                found, source[threshold] = _with(found, threshold, value), name
    return found, source


def _with(policy: SafetyPolicy, threshold: str, value: Any) -> SafetyPolicy:
    changes = {threshold: value}
    # Merged from two valid pairs, so only the step between two thresholds can be out of order.
    if threshold == "confidence_refuse":
        changes["confidence_auto"] = max(value, policy.confidence_auto)
    return replace(policy, **changes)


def _number(value: Any) -> float:
    return float(risk_rank(Risk(value))) if isinstance(value, str) else float(value)


def thresholds() -> frozenset[str]:
    """All fields of a safety policy that are thresholds."""
    return frozenset(field.name for field in fields(SafetyPolicy)) - {"name", "version"}
