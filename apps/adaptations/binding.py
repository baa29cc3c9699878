"""What an approval is bound to: the hash of everything that the approver is shown."""

from __future__ import annotations

from typing import Any

from apps.adaptations.models import Adaptation, Plan
from esper.contracts.attestation import content_hash


def shown_hash(adaptation: Adaptation) -> str:
    """Hex SHA-256 over the change, the trainer that it is for, its cost, reasons and evidence.

    It is stored when the adaptation is proposed. An approval must name it, and it is computed again
    from the row before the row is acted on, so that a row which was changed is not.
    """
    return content_hash(shown(adaptation))


def plan_hash(plan: Plan) -> str:
    """Hex SHA-256 over a plan: its members in order, each as it is now, its limits and its trainer.

    As :func:`shown_hash` for one adaptation: an approval of the whole names it.
    """
    members = plan.members.select_related("run", "blueprint", "safety_policy")
    content = {
        "plan": plan.uid,
        "run": plan.run.uid,
        "epoch": plan.run_epoch,
        "step": plan.proposed_step,
        "policy_version": plan.safety_policy.version,
        "value": plan.value,
        "limits": plan.limits,
        **_arguments(plan),
        "members": [shown_hash(member) for member in members.order_by("plan_place")],
    }
    return content_hash(_same_numbers(content))


def shown(adaptation: Adaptation) -> dict[str, Any]:
    """What the hash covers."""
    content = {
        "adaptation": adaptation.uid,
        "run": adaptation.run.uid,
        "epoch": adaptation.run_epoch,
        "layer": adaptation.layer,
        "since": adaptation.since,
        "adaptation_type": str(adaptation.adaptation_type),
        "kind": str(adaptation.kind),
        "slug": adaptation.slug,
        "title": adaptation.title,
        "config": adaptation.config,
        "edited": adaptation.edited,
        "risk": str(adaptation.risk),
        "confidence": adaptation.confidence,
        "forecast": [
            adaptation.forecast_parameters,
            adaptation.forecast_flops,
            adaptation.forecast_memory_mib,
            adaptation.forecast_latency_ms,
        ],
        "policy_version": adaptation.safety_policy.version,
        "step": adaptation.proposed_step,
        "evidence": adaptation.evidence,
        "found": adaptation.found,
        "why_not": adaptation.why_not,
        **_arguments(adaptation),
    }
    members: dict[str, Any] = _same_numbers(content)
    return members


def _arguments(row: Adaptation | Plan) -> dict[str, Any]:
    """What speaks for it and against it, as the person reads it."""
    return {"reasons": row.reasons, "checks": row.checks, "asks": row.asks}


def _same_numbers(value: Any) -> Any:
    """PostgreSQL's JSON gives 1e16 back as an integer, SQLite's as it was: both have one form."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _same_numbers(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_same_numbers(item) for item in value]
    return value
