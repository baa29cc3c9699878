"""All that other apps may do with adaptations."""

from apps.adaptations.acts import (
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
from apps.adaptations.compile_jobs import compile_kernel
from apps.adaptations.deadlines import sweep
from apps.adaptations.dispatch import dispatch_adaptation
from apps.adaptations.proposals import (
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
from apps.adaptations.verdicts import judge_adaptation

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
    "dispatch_adaptation",
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
