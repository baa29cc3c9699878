"""Limits on what a graft costs: a caller's own, and the policy's on measured numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from esper.contracts import (
    Certificate,
    Check,
    CostForecast,
    SafetyPolicy,
    ViolationRule,
    cost_limits,
)


def within(limits: Mapping[str, float], cost: CostForecast) -> tuple[Check, ...]:
    """A caller's limits (``max_memory_mb``, ``max_latency_ms``) on a cost.

    An unknown latency asks, an unknown memory blocks.

    Raises:
        ConfigurationError: a limit that nobody knows, or that is not a finite number >= 0.
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


def check_measured(certificate: Certificate, policy: SafetyPolicy) -> tuple[Check, ...]:
    """Measured cost and the certificate itself, before a kernel is dispatched. All are hard."""
    failures = "; ".join(certificate.failures)
    return (
        Check(
            rule=ViolationRule.CERTIFICATE,
            passed=certificate.passed,
            hard=True,
            observed=failures or "passed",
            limit="passed",
            text=f"The certificate failed: {failures}."
            if failures
            else "Every promise of the graft contract was kept.",
        ),
        _at_most(
            ViolationRule.MEMORY, certificate.memory_mib, policy.max_memory_mib, "MiB", hard=True
        ),
        _at_most(
            ViolationRule.LATENCY, certificate.latency_ms, policy.max_latency_ms, "ms", hard=True
        ),
    )


def _at_most(rule: ViolationRule, value: float, limit: float, unit: str, *, hard: bool) -> Check:
    known = math.isfinite(value)
    return Check(
        rule=rule,
        passed=value <= limit if known else None,
        hard=known or hard,
        observed=f"{value:.4g} {unit}" if known else "unknown",
        limit=f"{limit:.4g} {unit}",
        text=f"{value:.4g} {unit}, at most {limit:.4g} {unit}."
        if known
        else f"Unknown; at most {limit:.4g} {unit} count.",
    )
