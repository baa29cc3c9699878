"""Limits on what a graft costs: a caller's own, and the policy's on measured numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from esper.contracts import (
    Certificate,
    Check,
    CostForecast,
    SafetyPolicy,
    ViolationRule,
    cost_limits,
)


def within(limits: Mapping[str, float], cost: CostForecast) -> tuple[Check, ...]:
    """Checks a cost against a caller's limits (``max_memory_mb``, ``max_latency_ms``).

    An unknown latency asks, an unknown memory blocks.

    Raises:
        ConfigurationError: an unknown limit, or a value that is not a finite number >= 0.
    """
    limit = cost_limits(limits)
    checks = []
    if "max_memory_mib" in limit:
        checks.append(
            _at_most(
                ViolationRule.MEMORY, cost.memory_mib, limit["max_memory_mib"], "MiB", hard=True
            )
        )
    if "max_latency_ms" in limit:
        checks.append(
            _at_most(
                ViolationRule.LATENCY, cost.latency_ms, limit["max_latency_ms"], "ms", hard=False
            )
        )
    return tuple(checks)


def check_forecast(forecast: CostForecast, policy: SafetyPolicy) -> tuple[Check, ...]:
    """Checks the forecast against the policy, before the build. An unknown latency passes."""
    return (
        _at_most(
            ViolationRule.MEMORY, forecast.memory_mib, policy.max_memory_mib, "MiB", hard=True
        ),
        _at_most(
            ViolationRule.LATENCY, forecast.latency_ms, policy.max_latency_ms, "ms", hard=False
        ),
    )


def check_measured(
    certificate: Certificate,
    policy: SafetyPolicy,
    *,
    forecast: CostForecast | None = None,
    peak_memory_mib: float = math.nan,
) -> tuple[Check, ...]:
    """Checks measured cost and certificate, before a kernel is dispatched. All are hard.

    Args:
        forecast: the expected cost; the texts name it beside the measured one.
        peak_memory_mib: measured allocation of one step; the larger of it and the certificate's
            memory counts.
    """
    failures = "; ".join(certificate.failures)
    expected = forecast or CostForecast(0, 0, math.nan, math.nan)
    # max() keeps a NaN only as its first argument: unknown memory stays unknown.
    memory_mib = max(certificate.memory_mib, peak_memory_mib)
    return (
        Check(
            rule=ViolationRule.CERTIFICATE,
            passed=certificate.passed,
            hard=True,
            observed=failures or "passed",
            limit="passed",
            text=f"The certificate failed: {failures}."
            if failures
            else "Every point of the graft contract holds.",
        ),
        _beside_forecast(
            _at_most(ViolationRule.MEMORY, memory_mib, policy.max_memory_mib, "MiB", hard=True),
            expected.memory_mib,
            "MiB",
        ),
        _beside_forecast(
            _at_most(
                ViolationRule.LATENCY,
                certificate.latency_ms,
                policy.max_latency_ms,
                "ms",
                hard=True,
            ),
            expected.latency_ms,
            "ms",
        ),
    )


def _beside_forecast(check: Check, forecast: float, unit: str) -> Check:
    """Both numbers in one sentence: a violated limit may be due to a wrong forecast."""
    if not math.isfinite(forecast):
        return check
    expected = f"{forecast:.4g} {unit}"
    return replace(
        check,
        observed=f"{check.observed} measured, {expected} forecast",
        text=f"{_subject(check.rule)} is {check.observed} measured, forecast {expected}; "
        f"the limit is {check.limit}.",
    )


def _at_most(rule: ViolationRule, value: float, limit: float, unit: str, *, hard: bool) -> Check:
    known = math.isfinite(value)
    return Check(
        rule=rule,
        passed=value <= limit if known else None,
        hard=known or hard,
        observed=f"{value:.4g} {unit}" if known else "unknown",
        limit=f"{limit:.4g} {unit}",
        text=f"{_subject(rule)} is {value:.4g} {unit}; the limit is {limit:.4g} {unit}."
        if known
        else f"{_subject(rule)} is unknown; the limit is {limit:.4g} {unit}.",
    )


def _subject(rule: str) -> str:
    return f"The graft's {rule.replace('_', ' ')}"
