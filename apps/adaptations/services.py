"""All that other apps may do with adaptations."""

from apps.adaptations.compiling import compile_kernel
from apps.adaptations.deciding import (
    approve_adaptation,
    cancel_adaptation,
    claim_adaptation,
    evidence_drift,
    evidence_now,
    extend_adaptation,
    permissions,
    reject_adaptation,
    release_adaptation,
    roll_back_adaptation,
    set_adaptation_switch,
    undo_plan,
)
from apps.adaptations.dispatching import dispatch
from apps.adaptations.judging import judge_adaptation
from apps.adaptations.proposing import (
    GateClosedError,
    Proposal,
    propose_adaptation,
    record_decline,
)
from apps.adaptations.remedies import RemedyReport, record_remedy
from apps.adaptations.reports import (
    LocalRollback,
    acknowledge_command,
    finish_run,
    record_local_rollback,
    register_run,
    settle_hello,
)
from apps.adaptations.sweeping import sweep

__all__ = [
    "GateClosedError",
    "LocalRollback",
    "Proposal",
    "RemedyReport",
    "acknowledge_command",
    "approve_adaptation",
    "cancel_adaptation",
    "claim_adaptation",
    "compile_kernel",
    "dispatch",
    "evidence_drift",
    "evidence_now",
    "extend_adaptation",
    "finish_run",
    "judge_adaptation",
    "permissions",
    "propose_adaptation",
    "record_decline",
    "record_local_rollback",
    "record_remedy",
    "register_run",
    "reject_adaptation",
    "release_adaptation",
    "roll_back_adaptation",
    "set_adaptation_switch",
    "settle_hello",
    "sweep",
    "undo_plan",
]
