"""From what Tamiyo sends (checked by the serializers) to the services' dataclasses."""

from __future__ import annotations

from typing import Any

from apps.adaptations.services import Proposal
from apps.rest.numbers import finite_or_none
from esper.contracts import AdaptationType, Check, CostForecast, Risk, ViolationRule


def proposal_from_wire(given: dict[str, Any]) -> Proposal:
    """Numbers that are stored for people become None where they are unknown."""
    return Proposal(
        **{
            **given,
            "adaptation_type": AdaptationType(given["adaptation_type"]),
            "risk": Risk(given["risk"]),
            "forecast": CostForecast(**given["forecast"]),
            "reasons": [_without_unknown(line) for line in given["reasons"]],
            "checks": [dict(line) for line in given["checks"]],
            "why_not": [dict(line) for line in given["why_not"]],
            "evidence": {name: finite_or_none(value) for name, value in given["evidence"].items()},
        }
    )


def check_from_wire(line: dict[str, Any]) -> Check:
    return Check(**{**line, "rule": ViolationRule(line["rule"])})


def _without_unknown(line: dict[str, Any]) -> dict[str, Any]:
    return {
        name: finite_or_none(value) if isinstance(value, float) else value
        for name, value in line.items()
    }
