"""How pages show states: a tone, a shape and a word, never the colour alone.

Six tones, mildest first: off, standby, normal, caution, serious, critical. ``good`` marks a normal
state that ended well. The words are marked here, and translated where they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from django.utils.translation import gettext_noop as _

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
    _A.PROPOSED: Status("standby", "ring", _("Proposed")),
    _A.AWAITING_APPROVAL: Status("caution", "triangle", _("Waiting for a person")),
    _A.APPROVED: Status("standby", "half", _("Approved")),
    _A.COMPILE_QUEUED: Status("standby", "half", _("Waiting for a worker")),
    _A.COMPILING: Status("standby", "half", _("Compiling")),
    _A.COMPILED: Status("standby", "half", _("Compiled")),
    _A.DISPATCHED: Status("standby", "half", _("Sent to the trainer")),
    _A.ACCEPTED: Status("standby", "half", _("Accepted by the trainer")),
    _A.PROBATION: Status("normal", "half", _("On probation")),
    _A.ROLLING_BACK: Status("caution", "down", _("Rolling back")),
    _A.IN_DOUBT: Status(
        "serious", "question", _("No answer yet: the trainer is asked what it did")
    ),
    _A.KEPT: Status("good", "check", _("Kept")),
    _A.ROLLED_BACK: Status("off", "down", _("Rolled back")),
    _A.DECLINED: Status("off", "cross", _("Declined by a check")),
    _A.REJECTED: Status("off", "cross", _("Rejected")),
    _A.EXPIRED: Status("off", "clock", _("Expired: nothing was changed")),
    _A.SUPERSEDED: Status("off", "cross", _("Superseded")),
    _A.CANCELLED: Status("off", "cross", _("Cancelled")),
    _A.COMPILE_FAILED: Status("serious", "square", _("Compile failed")),
    _A.DISPATCH_EXPIRED: Status("serious", "square", _("Not sent in time")),
    _A.NOT_APPLIED: Status("caution", "cross", _("Not applied by the trainer")),
    _A.APPLY_FAILED: Status("serious", "square", _("Could not be applied")),
    _A.ROLLBACK_FAILED: Status("critical", "square", _("Rollback failed")),
    _A.REVERTED: Status("off", "down", _("Kept, then taken out")),
    _A.RUN_LOST: Status("serious", "question", _("Run lost")),
}
RUN: dict[RunState, Status] = {
    RunState.STARTING: Status("standby", "ring", _("Starting")),
    RunState.RUNNING: Status("normal", "disc", _("Running")),
    RunState.UNREACHABLE: Status("serious", "question", _("Unreachable")),
    RunState.FINISHED: Status("off", "check", _("Finished")),
    RunState.FAILED: Status("serious", "square", _("Failed")),
    RunState.LOST: Status("serious", "question", _("Lost")),
}
COMMAND: dict[CommandState, Status] = {
    CommandState.ISSUED: Status("standby", "ring", _("Requested")),
    CommandState.ACCEPTED: Status("standby", "half", _("Accepted by the trainer")),
    CommandState.APPLIED: Status("good", "check", _("Done")),
    CommandState.REFUSED: Status("serious", "square", _("Refused")),
    CommandState.FAILED: Status("serious", "square", _("Failed, model unchanged")),
    CommandState.EXPIRED: Status("off", "clock", _("Expired")),
}
JOB: dict[JobState, Status] = {
    JobState.QUEUED: Status("standby", "ring", _("Queued")),
    JobState.RUNNING: Status("normal", "half", _("Building")),
    JobState.DONE: Status("good", "check", _("Done")),
    JobState.FAILED: Status("serious", "square", _("Failed")),
    JobState.CANCELLED: Status("off", "cross", _("Cancelled")),
}
WORKER: dict[WorkerState, Status] = {
    WorkerState.IDLE: Status("normal", "disc", _("Idle")),
    WorkerState.BUSY: Status("normal", "half", _("Busy")),
    WorkerState.STOPPING: Status("standby", "half", _("Stopping")),
    WorkerState.OFFLINE: Status("serious", "question", _("Offline")),
}
MODE: dict[WorkerMode, Status] = {
    WorkerMode.ACTIVE: Status("normal", "disc", _("Takes jobs")),
    WorkerMode.DRAINING: Status("caution", "half", _("Draining")),
    WorkerMode.QUARANTINED: Status("serious", "square", _("In quarantine")),
}
SPEED_UP: dict[SpeedUpState, Status] = {
    SpeedUpState.QUEUED: Status("standby", "ring", _("Waiting to be compiled")),
    SpeedUpState.BUILDING: Status("normal", "half", _("Being compiled")),
    SpeedUpState.OFFERED: Status("standby", "half", _("Offered to the trainer")),
    SpeedUpState.SWAPPED_IN: Status("good", "check", _("Compiled, swapped in")),
    SpeedUpState.KEPT_EAGER: Status("off", "down", _("Kept eager")),
    SpeedUpState.UNAVAILABLE: Status("off", "question", _("No compiler available")),
    SpeedUpState.FAILED: Status("caution", "cross", _("Could not be compiled")),
}
# Tier 0 is validated and packaged and runs in eager PyTorch: never call it compiled.
TIERS: dict[int, str] = {0: _("validated"), 1: _("compiled for this device"), 2: _("packaged")}
# The steps of a build, by the name under which the builder reports their time.
BUILD_STEPS: dict[str, str] = {
    "specialise": _("made for this layer"),
    "certify": _("certified"),
    "measure": _("measured"),
    "inductor": _("compiled by torch.compile"),
    "child": _("start of the compiler, and its trial of the speed"),
}
CERTIFICATE: dict[str, str] = {
    "max_abs_diff": _("largest change of the output at the graft"),
    "tolerance": _("allowed change of the output"),
    "preserving": _("output preserved"),
    "live": _("receives a gradient at step 0"),
    "rng_neutral": _("random generators unchanged"),
    "parameters": _("parameters"),
    "parameters_declared": _("declared parameters"),
    "undo_exact": _("undo exact"),
    "host_untouched": _("host layer unchanged"),
    "memory_mib": _("memory, MiB"),
    "latency_ms": _("latency, ms"),
}
LAUNCH: dict[LaunchState, Status] = {
    LaunchState.REQUESTED: Status("standby", "ring", _("Requested")),
    LaunchState.STARTING: Status("standby", "half", _("Starting")),
    LaunchState.RUNNING: Status("normal", "disc", _("Running")),
    LaunchState.STOPPING: Status("caution", "half", _("Stopping")),
    LaunchState.STOPPED: Status("off", "down", _("Stopped")),
    LaunchState.FINISHED: Status("good", "check", _("Finished")),
    LaunchState.FAILED: Status("serious", "square", _("Failed")),
    LaunchState.LOST: Status("serious", "question", _("Lost: its host does not report")),
}
SEVERITY: dict[Severity, Status] = {
    Severity.INFO: Status("standby", "ring", _("Info")),
    Severity.CAUTION: Status("caution", "triangle", _("Caution")),
    Severity.SERIOUS: Status("serious", "square", _("Serious")),
    Severity.CRITICAL: Status("critical", "octagon", _("Critical")),
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
    ViolationRule.FROZEN: _("adaptation switch"),
    ViolationRule.RUN_MODE: _("mode of the run"),
    ViolationRule.ONE_IN_FLIGHT: _("adaptations in progress"),
    ViolationRule.COOLDOWN: _("cooldown"),
    ViolationRule.PARAMETER_BUDGET: _("added parameters"),
    ViolationRule.MEMORY: _("memory"),
    ViolationRule.LATENCY: _("latency"),
    ViolationRule.DAILY_BUDGET: _("grafts in a day"),
    ViolationRule.RISK_CLASS: _("risk"),
    ViolationRule.EVIDENCE: _("evidence"),
    ViolationRule.CONFIDENCE: _("confidence"),
    ViolationRule.COMPATIBILITY: _("compatibility with the layer"),
    ViolationRule.CERTIFICATE: _("certificate"),
    ViolationRule.SIGNATURE: _("signature"),
    ViolationRule.COMMAND: _("command"),
    ViolationRule.NON_FINITE: _("loss is not a number"),
    ViolationRule.LOSS_BLOW_UP: _("loss diverged"),
    ViolationRule.MISSING_TELEMETRY: _("missing telemetry"),
    ViolationRule.OPTIMIZER_LEDGER: _("optimizer's parameter groups"),
    ViolationRule.DEADLINE: _("deadline"),
    ViolationRule.DIAGNOSIS: _("diagnosis"),
}
