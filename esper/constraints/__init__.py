"""One pure check per limit. A failed check is a result with numbers, not an exception."""

from esper.constraints.gates import (
    GateInputs,
    check_blueprint,
    check_gates,
    check_run,
    gate_inputs,
    required_evidence,
)
from esper.constraints.limits import check_forecast, check_measured, within
from esper.constraints.remedy_gates import RemedyInputs, check_asked_for, check_remedy

__all__ = [
    "GateInputs",
    "RemedyInputs",
    "check_asked_for",
    "check_blueprint",
    "check_forecast",
    "check_gates",
    "check_measured",
    "check_remedy",
    "check_run",
    "gate_inputs",
    "required_evidence",
    "within",
]
