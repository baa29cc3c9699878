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

__all__ = [
    "GateInputs",
    "check_blueprint",
    "check_forecast",
    "check_gates",
    "check_measured",
    "check_run",
    "gate_inputs",
    "required_evidence",
    "within",
]
