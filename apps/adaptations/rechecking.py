"""The gates again, for an adaptation that waits: before a dry run, and after a person's edit."""

from __future__ import annotations

import math

from apps.adaptations.models import Adaptation
from apps.adaptations.proposals import check_compatibility, gate_inputs_of
from apps.adaptations.remedy_proposals import remedy_checks_now
from apps.policies.services import current_policy
from esper.constraints import check_gates
from esper.contracts import Check, CostForecast


def checks_now(adaptation: Adaptation) -> tuple[Check, ...]:
    """All gates of a proposal, with what holds now and under the policy in force."""
    if adaptation.remedy:
        return remedy_checks_now(adaptation)
    run, blueprint = adaptation.run, adaptation.grafted_blueprint
    inputs = gate_inputs_of(
        run,
        blueprint,
        layer=adaptation.layer,
        step=run.step,
        forecast=CostForecast(
            adaptation.forecast_parameters,
            adaptation.forecast_flops,
            _nan_for_none(adaptation.forecast_memory_mib),
            _nan_for_none(adaptation.forecast_latency_ms),
        ),
        evidence={name: _nan_for_none(value) for name, value in adaptation.evidence.items()},
        confidence=_nan_for_none(adaptation.confidence),
        besides=adaptation.pk,
    )
    return (
        *check_gates(inputs, current_policy(run).safety_policy()),
        check_compatibility(run, adaptation.layer, blueprint, besides=adaptation.pk),
    )


def _nan_for_none(value: float | None) -> float:
    return math.nan if value is None else value
