"""How pages show states: a tone, a shape and a word, never the colour alone.

Six tones, mildest first: off, standby, normal, caution, serious, critical. ``good`` marks a normal
state that ended well.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.contracts import (
    AdaptationState,
    CommandState,
    JobState,
    LaunchState,
    RunState,
    Severity,
    SpeedUpState,
    ViolationRule,
    WorkerMode,
    WorkerState,
)


@dataclass(frozen=True, slots=True)
class Status:
    """``shape`` is the id of a symbol in ``console/shapes.svg``."""

    tone: str
    shape: str
    word: str


_A = AdaptationState
ADAPTATION: dict[AdaptationState, Status] = {
    _A.PROPOSED: Status("standby", "ring", "Proposed"),
    _A.AWAITING_APPROVAL: Status("caution", "triangle", "Waiting for a person"),
    _A.APPROVED: Status("standby", "half", "Approved"),
    _A.COMPILE_QUEUED: Status("standby", "half", "Waiting for a worker"),
    _A.COMPILING: Status("standby", "half", "Compiling"),
    _A.COMPILED: Status("standby", "half", "Compiled"),
    _A.DISPATCHED: Status("standby", "half", "Sent to the trainer"),
    _A.ACCEPTED: Status("standby", "half", "Accepted by the trainer"),
    _A.PROBATION: Status("normal", "half", "On probation"),
    _A.ROLLING_BACK: Status("caution", "down", "Rolling back"),
    _A.IN_DOUBT: Status("serious", "question", "No answer yet: the trainer is asked what it did"),
    _A.KEPT: Status("good", "check", "Kept"),
    _A.ROLLED_BACK: Status("off", "down", "Rolled back"),
    _A.DECLINED: Status("off", "cross", "Declined by a check"),
    _A.REJECTED: Status("off", "cross", "Rejected"),
    _A.EXPIRED: Status("off", "clock", "Expired: nothing was changed"),
    _A.SUPERSEDED: Status("off", "cross", "Superseded"),
    _A.CANCELLED: Status("off", "cross", "Cancelled"),
    _A.COMPILE_FAILED: Status("serious", "square", "Compile failed"),
    _A.DISPATCH_EXPIRED: Status("serious", "square", "Not sent in time"),
    _A.NOT_APPLIED: Status("caution", "cross", "Not applied by the trainer"),
    _A.APPLY_FAILED: Status("serious", "square", "Could not be applied"),
    _A.ROLLBACK_FAILED: Status("critical", "square", "Rollback failed"),
    _A.REVERTED: Status("off", "down", "Reverted by a person"),
    _A.RUN_LOST: Status("serious", "question", "Run lost"),
}
RUN: dict[RunState, Status] = {
    RunState.STARTING: Status("standby", "ring", "Starting"),
    RunState.RUNNING: Status("normal", "disc", "Running"),
    RunState.UNREACHABLE: Status("serious", "question", "Unreachable"),
    RunState.FINISHED: Status("off", "check", "Finished"),
    RunState.FAILED: Status("serious", "square", "Failed"),
    RunState.LOST: Status("serious", "question", "Lost"),
}
COMMAND: dict[CommandState, Status] = {
    CommandState.ISSUED: Status("standby", "ring", "Requested"),
    CommandState.ACCEPTED: Status("standby", "half", "Accepted by the trainer"),
    CommandState.APPLIED: Status("good", "check", "Done"),
    CommandState.REFUSED: Status("serious", "square", "Refused"),
    CommandState.FAILED: Status("serious", "square", "Failed, model unchanged"),
    CommandState.EXPIRED: Status("off", "clock", "Expired"),
}
JOB: dict[JobState, Status] = {
    JobState.QUEUED: Status("standby", "ring", "Queued"),
    JobState.RUNNING: Status("normal", "half", "Building"),
    JobState.DONE: Status("good", "check", "Done"),
    JobState.FAILED: Status("serious", "square", "Failed"),
    JobState.CANCELLED: Status("off", "cross", "Cancelled"),
}
WORKER: dict[WorkerState, Status] = {
    WorkerState.IDLE: Status("normal", "disc", "Idle"),
    WorkerState.BUSY: Status("normal", "half", "Busy"),
    WorkerState.STOPPING: Status("standby", "half", "Stopping"),
    WorkerState.OFFLINE: Status("serious", "question", "Offline"),
}
MODE: dict[WorkerMode, Status] = {
    WorkerMode.ACTIVE: Status("normal", "disc", "Takes jobs"),
    WorkerMode.DRAINING: Status("caution", "half", "Draining"),
    WorkerMode.QUARANTINED: Status("serious", "square", "In quarantine"),
}
SPEED_UP: dict[SpeedUpState, Status] = {
    SpeedUpState.QUEUED: Status("standby", "ring", "Waiting to be compiled"),
    SpeedUpState.BUILDING: Status("normal", "half", "Being compiled"),
    SpeedUpState.OFFERED: Status("standby", "half", "Offered to the trainer"),
    SpeedUpState.SWAPPED_IN: Status("good", "check", "Compiled, swapped in"),
    SpeedUpState.KEPT_EAGER: Status("off", "down", "Kept eager"),
    SpeedUpState.UNAVAILABLE: Status("off", "question", "No compiler available"),
    SpeedUpState.FAILED: Status("caution", "cross", "Could not be compiled"),
}
# Tier 0 is validated and packaged and runs in eager PyTorch: never call it compiled.
TIERS: dict[int, str] = {0: "validated", 1: "compiled for this device", 2: "packaged"}
CERTIFICATE: dict[str, str] = {
    "max_abs_diff": "largest change of the output at the graft",
    "tolerance": "allowed change of the output",
    "preserving": "output preserved",
    "live": "receives a gradient at step 0",
    "rng_neutral": "random generators unchanged",
    "parameters": "parameters",
    "parameters_declared": "declared parameters",
    "undo_exact": "undo exact",
    "host_untouched": "host layer unchanged",
    "memory_mib": "memory, MiB",
    "latency_ms": "latency, ms",
}
LAUNCH: dict[LaunchState, Status] = {
    LaunchState.REQUESTED: Status("standby", "ring", "Requested"),
    LaunchState.STARTING: Status("standby", "half", "Starting"),
    LaunchState.RUNNING: Status("normal", "disc", "Running"),
    LaunchState.STOPPING: Status("caution", "half", "Stopping"),
    LaunchState.STOPPED: Status("off", "down", "Stopped"),
    LaunchState.FINISHED: Status("good", "check", "Finished"),
    LaunchState.FAILED: Status("serious", "square", "Failed"),
    LaunchState.LOST: Status("serious", "question", "Lost: its host does not report"),
}
SEVERITY: dict[Severity, Status] = {
    Severity.INFO: Status("standby", "ring", "Info"),
    Severity.CAUTION: Status("caution", "triangle", "Caution"),
    Severity.SERIOUS: Status("serious", "square", "Serious"),
    Severity.CRITICAL: Status("critical", "octagon", "Critical"),
}
BY_KIND: dict[str, dict[str, Status]] = {
    "adaptation": {str(state): status for state, status in ADAPTATION.items()},
    "run": {str(state): status for state, status in RUN.items()},
    "command": {str(state): status for state, status in COMMAND.items()},
    "job": {str(state): status for state, status in JOB.items()},
    "mode": {str(mode): status for mode, status in MODE.items()},
    "speed_up": {str(state): status for state, status in SPEED_UP.items()},
    "worker": {str(state): status for state, status in WORKER.items()},
    "launch": {str(state): status for state, status in LAUNCH.items()},
    "severity": {str(level): status for level, status in SEVERITY.items()},
}
RULES: dict[str, str] = {
    ViolationRule.FROZEN: "adaptation switch",
    ViolationRule.RUN_MODE: "mode of the run",
    ViolationRule.ONE_IN_FLIGHT: "adaptations in progress",
    ViolationRule.COOLDOWN: "cooldown",
    ViolationRule.PARAMETER_BUDGET: "added parameters",
    ViolationRule.MEMORY: "memory",
    ViolationRule.LATENCY: "latency",
    ViolationRule.DAILY_BUDGET: "grafts in a day",
    ViolationRule.RISK_CLASS: "risk",
    ViolationRule.EVIDENCE: "evidence",
    ViolationRule.CONFIDENCE: "confidence",
    ViolationRule.COMPATIBILITY: "compatibility with the layer",
    ViolationRule.CERTIFICATE: "certificate",
    ViolationRule.SIGNATURE: "signature",
    ViolationRule.COMMAND: "command",
    ViolationRule.NON_FINITE: "loss is not a number",
    ViolationRule.LOSS_BLOW_UP: "loss diverged",
    ViolationRule.MISSING_TELEMETRY: "missing telemetry",
    ViolationRule.OPTIMIZER_LEDGER: "optimizer's parameter groups",
    ViolationRule.DEADLINE: "deadline",
    ViolationRule.DIAGNOSIS: "diagnosis",
}
