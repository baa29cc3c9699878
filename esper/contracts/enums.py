"""All enumerations, declared once. Database, API, templates and SDK derive from these."""

from __future__ import annotations

from enum import StrEnum


class RunMode(StrEnum):
    """How far a run may be changed."""

    OBSERVE = "observe"  # measured, never changed
    SUPERVISED = "supervised"  # a person approves every graft
    AUTOMATIC = "automatic"  # above the auto threshold, no approval is needed


class RunState(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    UNREACHABLE = "unreachable"  # no report arrives; the training may still be running
    FINISHED = "finished"
    FAILED = "failed"
    LOST = "lost"  # unreachable for longer than the limit


RUN_ENDED = frozenset({RunState.FINISHED, RunState.FAILED, RunState.LOST})


class AdaptationState(StrEnum):
    """The life of one adaptation; the order is drawn in ``apps/adaptations/lifecycle.py``."""

    PROPOSED = "proposed"
    AWAITING_APPROVAL = "awaiting_approval"
    APPROVED = "approved"
    COMPILE_QUEUED = "compile_queued"
    COMPILING = "compiling"
    COMPILED = "compiled"
    DISPATCHED = "dispatched"
    ACCEPTED = "accepted"
    PROBATION = "probation"
    ROLLING_BACK = "rolling_back"
    IN_DOUBT = "in_doubt"
    KEPT = "kept"
    ROLLED_BACK = "rolled_back"
    DECLINED = "declined"
    REJECTED = "rejected"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"
    CANCELLED = "cancelled"
    COMPILE_FAILED = "compile_failed"
    DISPATCH_EXPIRED = "dispatch_expired"
    NOT_APPLIED = "not_applied"
    APPLY_FAILED = "apply_failed"
    ROLLBACK_FAILED = "rollback_failed"
    REVERTED = "reverted"
    RUN_LOST = "run_lost"


ADAPTATION_ENDED = frozenset(
    {
        AdaptationState.KEPT,
        AdaptationState.ROLLED_BACK,
        AdaptationState.DECLINED,
        AdaptationState.REJECTED,
        AdaptationState.EXPIRED,
        AdaptationState.SUPERSEDED,
        AdaptationState.CANCELLED,
        AdaptationState.COMPILE_FAILED,
        AdaptationState.DISPATCH_EXPIRED,
        AdaptationState.NOT_APPLIED,
        AdaptationState.APPLY_FAILED,
        AdaptationState.ROLLBACK_FAILED,
        AdaptationState.REVERTED,
        AdaptationState.RUN_LOST,
    }
)
# Entered and left in one transaction: nobody ever reads a row in one of these states, only its
# audit row, which says who proposed or approved it.
ADAPTATION_PASSED_THROUGH = frozenset({AdaptationState.PROPOSED, AdaptationState.APPROVED})
# The graft is (or may be) in the model.
ADAPTATION_GRAFTED = frozenset(
    {AdaptationState.PROBATION, AdaptationState.ROLLING_BACK, AdaptationState.KEPT}
)


class PlanState(StrEnum):
    """The life of a plan, of which each member is an adaptation with its own state."""

    AWAITING_APPROVAL = "awaiting_approval"
    APPLYING = "applying"  # approved; its members go into the model one after another
    APPLIED = "applied"  # every member is in the model, and is tested with the others in it
    TAKING_BACK = "taking_back"  # the last member that was applied goes first
    SETTLED = "settled"  # every member was kept, so the plan is kept
    TAKEN_BACK = "taken_back"  # nothing of it is in the model
    INCOMPLETE = "incomplete"  # a part of it stays in the model; its outcome says which
    REJECTED = "rejected"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"  # it cannot be approved any more: its trainer or a member is gone


PLAN_ENDED = frozenset(
    {
        PlanState.SETTLED,
        PlanState.TAKEN_BACK,
        PlanState.INCOMPLETE,
        PlanState.REJECTED,
        PlanState.EXPIRED,
        PlanState.WITHDRAWN,
    }
)


class VariantState(StrEnum):
    """The life of a variant of a blueprint; see ``esper.contracts.variants``."""

    SUGGESTED = "suggested"  # it may be tried in shadow, and is used nowhere
    ADMITTED = "admitted"  # by a curator; decisions may use it
    WITHDRAWN = "withdrawn"  # refused, or admitted no longer; never suggested again


class AdaptationType(StrEnum):
    ADD_ATTENTION = "add_attention"
    ADD_FFN = "add_ffn"
    ADD_MOE = "add_moe"
    ADD_EFFICIENCY = "add_efficiency"
    ADD_ROUTING = "add_routing"
    ADD_DIAGNOSTIC = "add_diagnostic"


class AdaptationKind(StrEnum):
    """What an adaptation does to its run."""

    GRAFT = "graft"  # adds a blueprint's module to a layer
    REMEDY = "remedy"  # a small change of the run, from the catalogue of remedies


class BlueprintCategory(StrEnum):
    TRANSFORMER = "transformer"
    MIXTURE_OF_EXPERTS = "mixture_of_experts"
    EFFICIENCY = "efficiency"
    ROUTING = "routing"
    DIAGNOSTICS = "diagnostics"


class GraftKind(StrEnum):
    """How a graft combines the layer's input x and output y."""

    PARALLEL = "parallel"  # y + f(x), f's last projection starts at zero
    SCALE = "scale"  # y * s, s starts at 1
    REPLACE = "replace"  # (1 - α) y + α f(x), α starts at 0
    WRAP = "wrap"  # y; changes gradients
    OBSERVE = "observe"  # y; changes nothing
    ASSEMBLY = "assembly"
    DISTRIBUTED = "distributed"


class Risk(StrEnum):
    """What can go wrong, mildest first; compare with ``risk_rank``."""

    NONE = "none"  # observes only
    LOW = "low"  # preserving, undone exactly, can be merged into the host
    MEDIUM = "medium"  # preserving, undone exactly, adds permanent cost
    HIGH = "high"  # changes the function by schedule; a person always approves


class RejectReason(StrEnum):
    """Why a person rejects an adaptation, for counts; their own words stand beside it."""

    NOT_NEEDED = "not_needed"
    WRONG_CHANGE = "wrong_change"
    TOO_RISKY = "too_risky"
    TOO_COSTLY = "too_costly"
    WEAK_EVIDENCE = "weak_evidence"
    WRONG_TIME = "wrong_time"
    OTHER = "other"


def risk_rank(risk: Risk) -> int:
    """0 for the mildest."""
    return list(Risk).index(risk)


class CommandKind(StrEnum):
    GRAFT = "graft"
    REMEDY = "remedy"
    UNDO = "undo"  # of a graft or of a remedy
    PAUSE_ADAPTATION = "pause_adaptation"
    RESUME_ADAPTATION = "resume_adaptation"
    STOP_RUN = "stop_run"
    SHADOW = "shadow"  # try a graft on a copy of the run; the run itself stays as it is
    SPEED_UP = "speed_up"  # try a graft's compiled kernel, and run it where it is faster
    KEEP = "keep"  # probation is passed: a graft may be merged, and the guard stops
    REPORT_HELD = "report_held"  # say whether the model holds an adaptation; changes nothing


class CommandState(StrEnum):
    ISSUED = "issued"
    ACCEPTED = "accepted"  # verified and journalled by the trainer
    APPLIED = "applied"  # carried out, at a step boundary
    REFUSED = "refused"  # not verified: wrong signature, epoch, sequence, expired
    FAILED = "failed"  # tried; the model is as before
    EXPIRED = "expired"


class RefusalCode(StrEnum):
    """Why a trainer refused a command."""

    BAD_SIGNATURE = "bad_signature"
    FOREIGN_RUN = "foreign_run"
    OLD_EPOCH = "old_epoch"
    REPLAYED = "replayed"
    EXPIRED = "expired"
    BAD_DIGEST = "bad_digest"
    UNKNOWN_BLUEPRINT = "unknown_blueprint"
    INCOMPATIBLE_LAYER = "incompatible_layer"
    CERTIFICATE_FAILED = "certificate_failed"
    MODE_FORBIDS = "mode_forbids"
    PAUSED = "paused"
    NOT_GRAFTED = "not_grafted"
    DOES_NOT_FIT = "does_not_fit"  # the remedy cannot be applied to this run now
    MERGED = "merged"  # the graft was folded into its host's weights and cannot be removed
    MALFORMED = "malformed"
    NO_FOREIGN_CODE = "no_foreign_code"  # this trainer does not run machine code of these workers
    UNAVAILABLE = "unavailable"  # the machine code cannot be loaded here
    NOT_FASTER = "not_faster"


class RemedyKind(StrEnum):
    """Changes of a run other than grafts; those of the catalogue have their slugs."""

    RECYCLE = "recycle"  # dead units get new weights
    SET_LR = "set_lr"
    FREEZE = "freeze"
    UNFREEZE = "unfreeze"
    MERGE = "merge"  # a kept graft is folded into its host's weights
    PRUNE = "prune"  # a graft is removed for good
    UNDO = "undo"  # of a graft, or of one of these
    ADOPT = "adopt"  # tensors that no optimizer holds are trained
    CLIP_LAYER = "clip_layer"  # each tensor's gradient is clipped by its own recent norms
    REPAIR_SCALE = "repair_scale"  # weights are scaled before training
    RESTORE_BEST = "restore_best"  # back to the weights with the lowest held-out loss
    REWIND = "rewind"  # back to an earlier good state
    SKIP_UPDATE = "skip_update"  # updates that are not finite are left out
    STOP_EARLY = "stop_early"  # the loop is asked to stop
    THAW = "thaw"  # frozen parameters are trained
    WEIGHT_DECAY = "weight_decay"
    MATCH_UPDATES = "match_updates"  # the learning rate was matched to the size of the weights
    HOLD_LR = "hold_lr"  # the learning rate has a given value
    EVALUATE_NOW = "evaluate_now"  # changes nothing
    CHECKPOINT_NOW = "checkpoint_now"  # changes nothing


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class SpeedUpState(StrEnum):
    """The progress of a graft's compiled kernel, or its result."""

    QUEUED = "queued"
    BUILDING = "building"
    OFFERED = "offered"  # the trainer has been told to try it
    SWAPPED_IN = "swapped_in"
    KEPT_EAGER = "kept_eager"  # not enough faster, or not wanted
    UNAVAILABLE = "unavailable"  # the worker has no compiler
    FAILED = "failed"


class WorkerState(StrEnum):
    """The last reported state of a worker."""

    IDLE = "idle"
    BUSY = "busy"
    STOPPING = "stopping"  # told to end; it finishes its job first
    OFFLINE = "offline"


class LaunchState(StrEnum):
    """The life of one launch of a recipe; the order is drawn in ``apps/recipes/lifecycle.py``."""

    REQUESTED = "requested"
    STARTING = "starting"  # its host has started to handle it
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"  # by a person, or with its host's Esper
    FINISHED = "finished"  # exit code 0
    FAILED = "failed"
    LOST = "lost"  # its host has stopped reporting; the process may still run


LAUNCH_ENDED = frozenset({LaunchState.STOPPED, LaunchState.FINISHED, LaunchState.FAILED})


class WorkerMode(StrEnum):
    """What a worker may do. ``draining`` and ``quarantined`` last until the worker is released."""

    ACTIVE = "active"
    DRAINING = "draining"  # finishes its job, claims no other
    QUARANTINED = "quarantined"  # claims no job, and its results are refused


class WorkerKind(StrEnum):
    COMPILE = "compile"
    CONTROL = "control"
    TAMIYO = "tamiyo"


class JobStep(StrEnum):
    """Finished steps of a compile job, in this order; a cached kernel has the first two."""

    CLAIMED = "claimed"
    FORECAST = "forecast"
    BUILT = "built"
    CERTIFIED = "certified"
    MEASURED = "measured"
    SIGNED = "signed"
    STORED = "stored"


class Severity(StrEnum):
    INFO = "info"
    CAUTION = "caution"
    SERIOUS = "serious"
    CRITICAL = "critical"


class ViolationRule(StrEnum):
    """Limits and rules that can be violated. Each gate names the one that it checks."""

    FROZEN = "frozen"
    RUN_MODE = "run_mode"
    ONE_IN_FLIGHT = "one_in_flight"
    COOLDOWN = "cooldown"
    PARAMETER_BUDGET = "parameter_budget"
    MEMORY = "memory"
    LATENCY = "latency"
    DAILY_BUDGET = "daily_budget"
    RISK_CLASS = "risk_class"
    EVIDENCE = "evidence"
    CONFIDENCE = "confidence"
    COMPATIBILITY = "compatibility"
    CERTIFICATE = "certificate"
    SIGNATURE = "signature"
    COMMAND = "command"
    NON_FINITE = "non_finite"
    LOSS_BLOW_UP = "loss_blow_up"
    MISSING_TELEMETRY = "missing_telemetry"
    OPTIMIZER_LEDGER = "optimizer_ledger"
    DEADLINE = "deadline"
    DIAGNOSIS = "diagnosis"  # a rule of esper.diagnosis; the finding's slug names it


class Role(StrEnum):
    VIEWER = "viewer"
    RESEARCHER = "researcher"
    OPERATOR = "operator"
    CURATOR = "curator"
    ADMIN = "admin"


class TokenScope(StrEnum):
    RUNS_CREATE = "runs:create"  # attach a trainer
    RUN_WRITE = "run:write"  # telemetry, acknowledgements and commands of one run
    READ = "read"  # everything that its owner may read
    ACT = "act"  # everything that its owner may do
    PROPOSE = "propose"  # ask for remedies, which then wait for a person; never approve
    DECIDE = "decide"  # Tamiyo: propose, judge
