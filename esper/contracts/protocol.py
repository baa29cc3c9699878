"""Every message of the protocol, once: what the SDK, Tamiyo, the server and the API document use.

``docs/protocol.md`` is written from these structs by ``python -m scripts.protocol_docs``, and the
OpenAPI document takes its components from them. :func:`esper.contracts.wire.to_wire` makes JSON of
a message; :func:`esper.contracts.wire.from_wire` makes a message of JSON and refuses what does not
fit. Members that a reader does not know are left out, so that an older server takes what a newer
SDK sends. A command is signed as a whole, and is refused with such a member.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from esper.contracts import codec, decisions, wire
from esper.contracts.commands import Command, CommandAck
from esper.contracts.decisions import (
    Check,
    CostForecast,
    Decision,
    Declined,
    Experience,
    LayerHistory,
    Plan,
    Reason,
    Reward,
    SafetyPolicy,
    Slug,
    WhyNot,
)
from esper.contracts.enums import (
    AdaptationState,
    AdaptationType,
    CommandState,
    GraftKind,
    RemedyKind,
    Risk,
    RunMode,
    ViolationRule,
)
from esper.contracts.health import MAX_LAYERS, Finding, HealthFrame, LayerInfo
from esper.contracts.variants import Variant
from esper.contracts.wire import Digest, Int64, Name, Number, Sentence, ShortText, Whole
from esper.exceptions import MessageError

MAX_LINES = 200  # reasons, checks, why-nots, asks
MAX_NUMBERS = 500  # of the evidence and of a reward
MAX_VERSIONS = 100
MAX_DEVICES = 64
MAX_FRAMES = 2_000
FRAMES_OF_ENTRY = 64  # of a batch in the stream of health frames; Tamiyo keeps as many of a run
MAX_METRICS = 1000  # entries, each with some values
MAX_VALUES = 64  # of one entry
MAX_FINDINGS = 200
MAX_POLICIES = 10
MAX_MEMBERS = 20  # of a plan
MAX_DETAILS_BYTES = 4_000
# Base64 of it, and the rest of a proposal, must fit into one body.
MAX_SNAPSHOT_BYTES = 600_000

Step: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
StepOrNone: TypeAlias = Annotated[int, Meta(ge=-1, le=2**63 - 1)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0.0, le=2.0**40)]
Epoch: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Uid: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64)]
UidOrEmpty: TypeAlias = Annotated[str, Meta(max_length=64)]
NameOrEmpty: TypeAlias = Annotated[str, Meta(max_length=255)]
Host: TypeAlias = Annotated[str, Meta(max_length=120)]
Capability: TypeAlias = Annotated[str, Meta(min_length=1, max_length=40)]
Version: TypeAlias = Annotated[str, Meta(max_length=80)]
Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4000)]
TextOrEmpty: TypeAlias = Annotated[str, Meta(max_length=4000)]
Reading: TypeAlias = float | Annotated[str, Meta(max_length=200)]  # a number, or words about one
MetricName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=80)]
MetricValues: TypeAlias = Annotated[dict[MetricName, Number], Meta(max_length=MAX_VALUES)]
Numbers: TypeAlias = Annotated[dict[str, Number], Meta(max_length=MAX_NUMBERS)]
FiniteNumbers: TypeAlias = Annotated[dict[str, float], Meta(max_length=MAX_NUMBERS)]
Checks: TypeAlias = Annotated[tuple[Check, ...], Meta(max_length=MAX_LINES)]
StoredSnapshot: TypeAlias = Annotated[bytes, Meta(max_length=MAX_SNAPSHOT_BYTES)]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages: members by keyword, and nothing changes after it was made."""


# --- a trainer's life -----------------------------------------------------------------------------


class Continued(Message, frozen=True, kw_only=True):
    """The run that a process trains already, when the server has lost its registration.

    Attributes:
        run: its uid.
        epoch: of the registration that the server accepts no more.
    """

    run: Uid
    epoch: Annotated[int, Meta(ge=0, le=2**30)]


class Registration(Message, frozen=True, kw_only=True):
    """A training run begins, or begins again.

    Attributes:
        name: of the run; the name of a live run of the same owner is a restart.
        mode: what Esper may do to it.
        host: the machine that it trains on.
        capability: what its kernels are built for, such as ``cpu`` or ``cuda.sm90``.
        capabilities: the same for each device of its layers, where there are several.
        target_steps: planned length; null: open.
        versions: of torch, python and esper.
        model_parameters: of the whole model, before any graft.
        layers: everything that was seen to run.
        continues: the run that this process trains already; null: it has just started.
    """

    name: Name
    mode: RunMode
    host: Host
    capability: Capability
    model_parameters: Whole
    layers: Annotated[tuple[LayerInfo, ...], Meta(max_length=2 * MAX_LAYERS)]
    capabilities: Annotated[dict[str, Capability], Meta(max_length=MAX_DEVICES)] = {}
    target_steps: Whole | None = None
    versions: Annotated[dict[str, Version], Meta(max_length=MAX_VERSIONS)] = {}
    continues: Continued | None = None

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            if not layer.name:  # the model itself, which is no layer of a run
                raise MessageError("A layer has a name", pointer=f"/layers/{index}/name")


class Registered(Message, frozen=True, kw_only=True):
    """The answer to a registration.

    Attributes:
        uid: the run's identifier.
        number: the run's number for people.
        epoch: counts the starts of this run.
        token: bearer token of scope ``run:write`` for this run only.
        resumed: true for a restart.
        command_key: public key of the server's commands.
        kernel_key: public key of its workers' kernels.
        stream: path of the trainer's websocket.
        last_command_seq: of the run's command log.
        policy: the safety policy in force.
        server_time: seconds since the epoch by the server's clock.
        telemetry_types: media types of telemetry that the server takes beside JSON.
    """

    uid: Uid
    epoch: Epoch
    token: str
    command_key: str
    kernel_key: str
    policy: SafetyPolicy
    server_time: float
    number: Whole = 0
    resumed: bool = False
    stream: str = ""
    last_command_seq: Whole = 0
    telemetry_types: tuple[str, ...] = ()


class Applied(Message, frozen=True, kw_only=True):
    """A graft that the model holds when the trainer says hello.

    Attributes:
        adaptation: its uid; empty for a graft that the server does not know.
        layer: where it is.
        blueprint: slug.
        step: when it was grafted; -1: unknown.
        merged: it was folded into its host's weights.
        kept: its probation has ended well, as the trainer was told.
        since: the layer whose input it reads; empty: that of ``layer``.
    """

    adaptation: UidOrEmpty
    layer: Name
    blueprint: Slug
    step: StepOrNone
    merged: bool = False
    kept: bool = False
    since: NameOrEmpty = ""


class HeldRemedy(Message, frozen=True, kw_only=True):
    """A remedy of the server that is in effect when the trainer says hello.

    Attributes:
        adaptation: its uid.
        step: when it was applied; -1: unknown.
        remedy: slug.
        layer: its name; empty for the whole run.
        config: its settings, as far as they are in force.
        finding: slug of the rule whose finding it answers; empty: a person asked for it, or it is
            not known any more.
        kept: its result is known, and it was not to be taken back.
    """

    adaptation: Uid
    step: StepOrNone
    remedy: Annotated[str, Meta(max_length=60)] = ""
    layer: NameOrEmpty = ""
    config: dict[str, Any] = {}
    finding: Annotated[str, Meta(max_length=60)] = ""
    kept: bool = False


class Hello(Message, frozen=True, kw_only=True):
    """What is in the model at the first step after a (re)start.

    Attributes:
        epoch: of the trainer.
        step: where the training is.
        applied: every graft that the model holds.
        last_command_seq: the last command of this run that the trainer has taken.
        remedies: of the server, those that are in effect in each step.
    """

    epoch: Whole
    step: Whole
    applied: Annotated[tuple[Applied, ...], Meta(max_length=MAX_LAYERS)]
    last_command_seq: Step = 0
    remedies: Annotated[tuple[HeldRemedy, ...], Meta(max_length=MAX_LINES)] = ()


class Settled(Message, frozen=True, kw_only=True):
    """An adaptation whose state is known now.

    Attributes:
        adaptation: its uid.
        state: the state that the server has settled on.
    """

    adaptation: str
    state: str


class HelloAnswer(Message, frozen=True, kw_only=True):
    """The answer to a hello.

    Attributes:
        settled: what was in doubt, and what is kept.
        server_time: seconds since the epoch by the clock that commands expire by; null: a server
            that does not say it here yet.
    """

    settled: tuple[Settled, ...] = ()
    server_time: float | None = None


class Frame(Message, frozen=True, kw_only=True):
    """All layers' signals at one step, with the loss of that step.

    Attributes:
        step: optimizer step.
        wall_time: seconds since the epoch by the trainer's clock.
        values: base64 of little-endian float32 [layers, signals], layers as registered.
        loss: the training loss of this step; null: not measured.
    """

    step: Step
    wall_time: Seconds
    values: bytes
    loss: Number | None = None

    @classmethod
    def of(cls, frame: HealthFrame) -> Frame:
        return cls(
            step=frame.step,
            wall_time=frame.wall_time,
            values=frame.values.astype("<f4", copy=False).tobytes(),
            loss=frame.metrics.get("loss"),
        )


class StepValues(Message, frozen=True, kw_only=True):
    """Numbers of one step.

    Attributes:
        step: optimizer step.
        values: by metric name.
    """

    step: Step
    values: MetricValues


class Metrics(StepValues, frozen=True, kw_only=True):
    """Run-wide numbers of one step.

    Attributes:
        step: optimizer step.
        values: by metric name; ``loss``, ``lr``, ``step_ms``, ``grad_norm``, ``eval_loss``,
            ``ablation_gain:<adaptation uid>`` and ``ablation_loss:<adaptation uid>`` are Esper's
            own.
        wall_time: seconds since the epoch by the trainer's clock.
    """

    wall_time: Seconds


class Telemetry(Message, frozen=True, kw_only=True):
    """A batch of what a trainer measured.

    Every frame, metrics entry and finding has one number in the trainer's own sequence.

    Attributes:
        epoch: of the trainer.
        seq_from: number of the first item.
        seq_to: number of the last item; a batch that is not above what is stored is a duplicate.
        frames: health frames.
        metrics: run-wide numbers.
        findings: what a person should know.
        dropped: items that were given up since the last batch.
    """

    epoch: Epoch
    seq_from: Annotated[int, Meta(ge=1, le=2**53)]
    seq_to: Step
    frames: Annotated[tuple[Frame, ...], Meta(max_length=MAX_FRAMES)] = ()
    metrics: Annotated[tuple[Metrics, ...], Meta(max_length=MAX_METRICS)] = ()
    findings: Annotated[tuple[Finding, ...], Meta(max_length=MAX_FINDINGS)] = ()
    dropped: Step = 0

    def __post_init__(self) -> None:
        if self.seq_to - self.seq_from + 1 != self.items:
            raise MessageError(
                f"{self.items} items are not {self.seq_from}…{self.seq_to}", pointer="/seq_to"
            )

    @property
    def items(self) -> int:
        return len(self.frames) + len(self.metrics) + len(self.findings)


class TelemetryAnswer(Message, frozen=True, kw_only=True):
    """The answer to a batch.

    Attributes:
        stored: items that were stored.
        duplicate: the batch was stored before.
        slow_down_ms: the trainer waits this long before the next one; an earlier one gets 429.
    """

    stored: Whole = 0
    duplicate: bool = False
    slow_down_ms: Whole = 0


class SignedCommand(Message, frozen=True, kw_only=True):
    """A command as it is sent.

    Attributes:
        command: the command.
        signature: base64 of the server's Ed25519 signature over the whole command.
    """

    command: Command
    signature: str


class Commands(Message, frozen=True, kw_only=True):
    """Commands that the trainer has not answered.

    Attributes:
        results: oldest first.
    """

    results: tuple[SignedCommand, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(CommandAck):
    """The answer to a command, with the trainer's epoch.

    Attributes:
        epoch: of the trainer.
    """

    epoch: Whole

    def __post_init__(self) -> None:
        if self.state in (CommandState.ISSUED, CommandState.EXPIRED):
            raise MessageError(f"{self.state} is not an answer of a trainer", pointer="/state")
        _check_size(self.details, "/details")


class AdaptationAnswer(Message, frozen=True, kw_only=True):
    """What a report did to its adaptation.

    Attributes:
        adaptation_state: empty where no adaptation is concerned.
    """

    adaptation_state: str = ""


class Rollback(Message, frozen=True, kw_only=True):
    """The trainer's own guard took a graft out.

    Attributes:
        epoch: of the trainer.
        adaptation: its uid.
        step: when.
        rule: what did not hold.
        observed: what was measured, a number or words.
        limit: what was allowed, a number or words.
        pause_ms: how long the training waited.
        exact: the model is what it was before the graft, to the bit.
        digest_after: SHA-256 of the model's named tensors.
        back_to_step: whose weights the model has again; -1: it keeps what it has learned since.
    """

    epoch: Whole
    adaptation: Uid
    step: Whole
    rule: ViolationRule
    observed: Reading
    limit: Reading
    exact: bool
    pause_ms: Number = 0.0
    digest_after: Digest = ""
    back_to_step: Int64 = -1


class RemedyReport(Message, frozen=True, kw_only=True):
    """What a training script did to its model by itself.

    Attributes:
        epoch: of the trainer.
        key: the trainer's own name for this act; a report is stored once for each.
        remedy: the kind of act.
        layer: where; empty: the whole run.
        step: when.
        details: numbers and words for a person, at most 4,000 bytes of JSON.
        pause_ms: how long the training waited.
        exact: of an undo: the model is what it was before, to the bit; null: not an undo.
        adaptation: uid of the adaptation that was merged, pruned or undone; empty: none.
        undoes: key of an earlier remedy; empty: none.
        digest_before, digest_after: SHA-256 of the model's named tensors.
        back_to_step: of an undo: whose weights the model has again; -1: it keeps what it has
            learned since.
    """

    epoch: Whole
    key: Uid
    remedy: RemedyKind
    layer: ShortText
    step: Whole
    details: dict[str, Any] = {}
    pause_ms: Number = 0.0
    exact: bool | None = None
    adaptation: UidOrEmpty = ""
    undoes: UidOrEmpty = ""
    digest_before: Digest = ""
    digest_after: Digest = ""
    back_to_step: Int64 = -1

    def __post_init__(self) -> None:
        _check_size(self.details, "/details")


class RemedyProposal(Message, frozen=True, kw_only=True):
    """The trainer has found a fault, and proposes the remedy that answers it.

    It may be sent again with the same key, to learn its state.

    Attributes:
        epoch: of the trainer.
        key: the trainer's own name for this proposal.
        step: when it was formed.
        remedy: slug of the catalogue.
        layer: where; empty: the whole run.
        config: the settings that this fault needs, at most 4,000 bytes of JSON.
        finding: the fault, with its rule in ``slug``.
        asks: why a person must decide, beside what the server itself asks for.
    """

    epoch: Whole
    key: Uid
    step: Whole
    remedy: Slug
    layer: ShortText
    finding: Finding
    config: dict[str, Any] = {}
    asks: Annotated[tuple[Sentence, ...], Meta(max_length=MAX_LINES)] = ()

    def __post_init__(self) -> None:
        if not self.finding.slug:
            raise MessageError("A remedy answers a rule's finding", pointer="/finding/slug")
        _check_size(self.config, "/config")


class RemedyAnswer(Message, frozen=True, kw_only=True):
    """The state of a proposed remedy.

    Attributes:
        adaptation: its uid.
        state: of the adaptation.
        reason: why it ended; empty while it has not.
    """

    adaptation: str
    state: AdaptationState
    reason: str = ""


class RemedyVerdict(Message, frozen=True, kw_only=True):
    """The end of a remedy's probation, judged by its symptom.

    Attributes:
        epoch: of the trainer.
        adaptation: its uid.
        keep: the finding is over, and has stayed away.
        reason: a sentence for a person.
        step: when it was judged.
        steps_observed: since it was applied.
        hard: with ``keep`` false: it did harm, so the run goes back to the state before it.
    """

    epoch: Whole
    adaptation: Uid
    keep: bool
    reason: Text
    step: Whole
    steps_observed: Whole
    hard: bool = False


def _check_size(members: dict[str, Any], pointer: str) -> None:
    if len(codec.encode(wire.to_wire(members))) > MAX_DETAILS_BYTES:
        raise MessageError(f"At most {MAX_DETAILS_BYTES} bytes of JSON are taken", pointer=pointer)


class Finish(Message, frozen=True, kw_only=True):
    """A run ends.

    Attributes:
        epoch: of the trainer.
        state: how.
        step: the last one.
        reason: a sentence for a person.
    """

    epoch: Whole
    state: Literal["finished", "failed"]
    step: Whole
    reason: TextOrEmpty = ""


# --- Tamiyo ---------------------------------------------------------------------------------------


class Active(Message, frozen=True, kw_only=True):
    """An adaptation that is under way on a run.

    Attributes:
        uid: the adaptation.
        state: where it is.
        layer: where it goes.
        blueprint: slug.
        kind: how the blueprint is grafted.
        risk: class of the blueprint.
        graft_step: null: it is not in the model yet.
        deadline_at: RFC 3339; null: none.
    """

    uid: str
    state: AdaptationState
    layer: str
    blueprint: str
    kind: GraftKind
    risk: Risk
    graft_step: int | None = None
    deadline_at: datetime | None = None

    @property
    def deadline_seconds(self) -> float:
        """Seconds since the epoch; infinite where there is none."""
        return self.deadline_at.timestamp() if self.deadline_at else math.inf


class Snapshot(Message, frozen=True, kw_only=True):
    """All that Tamiyo reads of a run to decide and to judge.

    Attributes:
        run, epoch, mode, step: of the run.
        layers: as registered.
        frames: recent ones, oldest first.
        metrics: recent losses and every ablation gain, oldest first.
        model_parameters: before any graft.
        added_parameters: of the grafts that it carries.
        adaptations_today: of the last 24 hours.
        in_flight: adaptations under way.
        last_adaptation_step: -1: never.
        frozen: why adaptation is switched off; empty: it is on.
        history: by layer name.
        experience: closed cases by blueprint slug.
        disabled_blueprints: slugs.
        safety_policy: every threshold.
        policy_version: of the safety policy.
        champion: name of the policy that decides; empty: the default one.
        active: adaptations under way.
        age_seconds: age of the newest frame; null: the reader takes it from the frame's time.
        findings: of the diagnosis, those that are open.
        variants: of blueprints, those that a curator has admitted.
    """

    run: str
    epoch: int
    mode: RunMode
    step: int
    layers: tuple[LayerInfo, ...]
    frames: tuple[Frame, ...]
    metrics: tuple[StepValues, ...]
    model_parameters: int
    added_parameters: int
    adaptations_today: int
    in_flight: int
    last_adaptation_step: Int64
    frozen: str
    history: dict[str, LayerHistory]
    experience: dict[str, Experience]
    disabled_blueprints: tuple[str, ...]
    safety_policy: SafetyPolicy
    policy_version: int = 0
    champion: Annotated[str, Meta(max_length=40)] = ""
    active: tuple[Active, ...] = ()
    age_seconds: Number | None = None
    findings: tuple[Finding, ...] = ()
    variants: tuple[Variant, ...] = ()


class Frames(Message, frozen=True, kw_only=True):
    """Health frames of the present epoch after a step.

    Attributes:
        epoch: of the run.
        layers: names of the rows of each frame.
        results: oldest first.
    """

    epoch: int
    layers: tuple[str, ...]
    results: tuple[Frame, ...]


class Proposal(Message, frozen=True, kw_only=True):
    """Tamiyo wants an adaptation, and says why.

    Attributes:
        epoch, step: of the run, when it was decided.
        layer: where.
        adaptation_type: which kind of help.
        confidence: probability that it really helps; may be "nan", which is never high.
        urgency: how fast the layer gets worse, 0..1.
        reasons: what speaks for and against it.
        blueprint: slug.
        config: of the blueprint.
        risk: class of the blueprint.
        forecast: cost by arithmetic.
        checks: every gate and limit that was looked at.
        why_not: one line for each blueprint that was not chosen.
        asks: why a person must agree; empty: nobody needs to.
        evidence: the numbers that the decision rests on.
        policy: which policy has decided.
        since: an earlier layer, whose input the graft reads; empty: it sits beside one layer.
        variant: uid of the admitted variant that the size comes from; empty: of none.
        chances: by policy, the probability with which it would have made this decision.
        snapshot: base64 of the deflated :class:`Snapshot` that was decided on; null: not sent.
        snapshot_note: why no snapshot was sent.
    """

    epoch: Whole
    step: Whole
    layer: Name
    adaptation_type: AdaptationType
    confidence: Number
    urgency: Number
    reasons: Annotated[tuple[Reason, ...], Meta(max_length=MAX_LINES)]
    blueprint: Slug
    config: dict[str, Any]
    risk: Risk
    forecast: CostForecast
    checks: Checks
    why_not: Annotated[tuple[WhyNot, ...], Meta(max_length=MAX_LINES)]
    asks: Annotated[tuple[Sentence, ...], Meta(max_length=MAX_LINES)]
    evidence: Numbers
    policy: Annotated[str, Meta(min_length=1, max_length=40)]
    since: Annotated[str, Meta(max_length=255)] = ""
    variant: Annotated[str, Meta(max_length=32)] = ""
    chances: Annotated[dict[str, float], Meta(max_length=MAX_POLICIES)] = {}
    snapshot: StoredSnapshot | None = None
    snapshot_note: Annotated[str, Meta(max_length=500)] = ""

    @classmethod
    def of(cls, decision: Decision, *, epoch: int) -> Proposal:
        adaptation = decision.adaptation
        return cls(
            epoch=epoch,
            step=decision.step,
            layer=adaptation.layer_name,
            adaptation_type=adaptation.adaptation_type,
            confidence=adaptation.confidence,
            urgency=adaptation.urgency,
            reasons=adaptation.reasons,
            blueprint=decision.blueprint,
            config=decision.config,
            risk=decision.risk,
            forecast=decision.forecast,
            checks=decision.checks,
            why_not=decision.why_not,
            asks=decision.asks,
            evidence=decision.evidence,
            policy=decision.policy,
            since=adaptation.since,
            variant=decision.variant,
        )

    def key(self, run: str) -> str:
        """Idempotency key: the same decision about the same moment is one proposal."""
        return f"{run}:{self.epoch}:{self.step}:{self.layer}:{self.adaptation_type}"


class PlanProposal(Message, frozen=True, kw_only=True):
    """Tamiyo wants several adaptations of one run, decided on together.

    Attributes:
        epoch, step: of the run, when it was decided.
        members: in the order in which they are to be applied; the first brings the snapshot.
        value: of the whole, in the units of a candidate's score.
        parameters, memory_mib, latency_ms: limits of the sum of all members.
        reasons: why just these, a sentence each.
        asks: why a person decides on it.
        policy: which policy has decided.
        best: it is shown that no other set within the limits is worth more.
    """

    epoch: Whole
    step: Whole
    members: Annotated[tuple[Proposal, ...], Meta(min_length=2, max_length=MAX_MEMBERS)]
    value: Number
    parameters: Whole
    memory_mib: Number
    latency_ms: Number
    reasons: Annotated[tuple[Sentence, ...], Meta(max_length=MAX_LINES)]
    asks: Annotated[tuple[Sentence, ...], Meta(max_length=MAX_LINES)]
    policy: Annotated[str, Meta(min_length=1, max_length=40)]
    best: bool = True

    def __post_init__(self) -> None:
        for index, member in enumerate(self.members):
            if (member.epoch, member.step) != (self.epoch, self.step):
                raise MessageError(
                    "A member is decided at the plan's epoch and step", pointer=f"/members/{index}"
                )

    @classmethod
    def of(cls, plan: Plan, members: tuple[Proposal, ...], *, epoch: int) -> PlanProposal:
        return cls(
            epoch=epoch,
            step=plan.step,
            members=members,
            value=plan.value,
            parameters=plan.parameters,
            memory_mib=plan.memory_mib,
            latency_ms=plan.latency_ms,
            reasons=plan.reasons,
            asks=plan.asks,
            policy=plan.policy,
            best=plan.best,
        )

    def key(self, run: str) -> str:
        """Idempotency key: one plan for one moment."""
        return f"{run}:{self.epoch}:{self.step}:plan"


class TriedSize(Message, frozen=True, kw_only=True):
    """What one size of a blueprint gained: a closed graft, or a trial in shadow.

    Attributes:
        uid: of the adaptation or the trial.
        decision: uid of the adaptation; what has the same one was tried at the same moment.
        layer: the layer or span, as registered.
        config: of the graft; of a trial of a variant that of the graft beside which it was tried.
        factors: of a trial of a variant; null: ``config`` itself was tried.
        gain: a share of the held-out loss; of a closed graft its reward.
    """

    uid: Annotated[str, Meta(max_length=32)]
    decision: Annotated[str, Meta(max_length=32)]
    layer: LayerInfo
    config: dict[str, Any]
    factors: dict[str, float] | None
    gain: Number


class TriedSizes(Message, frozen=True, kw_only=True):
    """All that Tamiyo needs to suggest a variant of a blueprint.

    Attributes:
        cases: newest last.
        taken: factors of every variant that was suggested before, whatever became of it.
        waiting: one waits to be tried or admitted, so no other is suggested.
    """

    cases: tuple[TriedSize, ...]
    taken: tuple[dict[str, float], ...]
    waiting: bool


class VariantSuggestion(Message, frozen=True, kw_only=True):
    """Tamiyo suggests that a variant is tried. It is used nowhere before a curator admits it.

    Attributes:
        factors: by setting, within the grammar of ``esper.contracts.variants``.
        chance: with which it was drawn.
        expected, error: its advantage over the usual size, with the standard error.
        cases: uids of the closed grafts and trials that it was learned from.
        policy: what has suggested it.
    """

    factors: dict[str, Number]
    chance: Number
    expected: Number
    error: Number
    cases: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=1000)]
    policy: Annotated[str, Meta(min_length=1, max_length=40)]


class Decline(Message, frozen=True, kw_only=True):
    """Tamiyo has said no, because a hard limit does not hold.

    Attributes:
        epoch, step: of the run, when it was decided.
        layer: where help was wanted.
        adaptation_type: which kind of help.
        confidence: of the proposal that was declined.
        reasons: sentences.
        checks: every gate and limit that was looked at; the hard ones that failed are violations.
        policy: which policy has decided.
        snapshot: base64 of the deflated :class:`Snapshot` that was decided on; null: not sent.
        snapshot_note: why no snapshot was sent.
    """

    epoch: Whole
    step: Whole
    layer: Name
    adaptation_type: AdaptationType
    confidence: Number
    reasons: Annotated[tuple[Sentence, ...], Meta(max_length=MAX_LINES)]
    checks: Checks
    policy: Annotated[str, Meta(max_length=40)] = ""
    snapshot: StoredSnapshot | None = None
    snapshot_note: Annotated[str, Meta(max_length=500)] = ""

    @classmethod
    def of(cls, declined: Declined, *, epoch: int, policy: str = "") -> Decline:
        """Raises ``ValueError`` where no adaptation was wanted: there is nothing to note then."""
        adaptation = declined.adaptation
        if adaptation is None:
            raise ValueError("no adaptation was proposed, so there is no decline to report")
        return cls(
            epoch=epoch,
            step=declined.step,
            layer=adaptation.layer_name,
            adaptation_type=adaptation.adaptation_type,
            confidence=adaptation.confidence,
            reasons=declined.reasons,
            checks=declined.checks,
            policy=policy,
        )


class Verdict(Message, frozen=True, kw_only=True):
    """The end of probation, with the numbers that it rests on (losses: lower is better).

    Attributes:
        keep: whether the graft stays.
        reason: a sentence for a person.
        ablation_gain: loss with the graft off minus on, on the same held-out batches.
        ablation_low, ablation_high: its 95 % interval.
        forecast_gain: extrapolated loss without the graft minus the observed one.
        forecast_interval: half width of the 95 % interval of the forecast.
        steps_observed: how many steps were looked at.
        reward: by term; their sum is what the policy learns from.
    """

    keep: bool
    reason: Text
    ablation_gain: Number
    ablation_low: Number = math.nan
    ablation_high: Number = math.nan
    forecast_gain: Number
    forecast_interval: Number
    steps_observed: Whole
    reward: FiniteNumbers

    @property
    def decided(self) -> decisions.Verdict:
        """The verdict without its reward."""
        return decisions.Verdict(
            keep=self.keep,
            reason=self.reason,
            ablation_gain=self.ablation_gain,
            ablation_low=self.ablation_low,
            ablation_high=self.ablation_high,
            forecast_gain=self.forecast_gain,
            forecast_interval=self.forecast_interval,
            steps_observed=self.steps_observed,
        )

    @classmethod
    def of(cls, verdict: decisions.Verdict, reward: Reward) -> Verdict:
        return cls(
            keep=verdict.keep,
            reason=verdict.reason,
            ablation_gain=verdict.ablation_gain,
            ablation_low=verdict.ablation_low,
            ablation_high=verdict.ablation_high,
            forecast_gain=verdict.forecast_gain,
            forecast_interval=verdict.forecast_interval,
            steps_observed=verdict.steps_observed,
            reward=reward.terms,
        )


class Heartbeat(Message, frozen=True, kw_only=True):
    """Tamiyo is alive.

    Attributes:
        instance: one of several that may share the runs.
        status: numbers of this instance.
    """

    instance: Annotated[str, Meta(min_length=1, max_length=100)]
    status: dict[str, Any] = {}


MESSAGES: Sequence[tuple[str, tuple[type, ...]]] = (
    (
        "A trainer's life",
        (
            Registration,
            Continued,
            Registered,
            Hello,
            Applied,
            HeldRemedy,
            HelloAnswer,
            Settled,
            Telemetry,
            Frame,
            Metrics,
            Finding,
            TelemetryAnswer,
            SignedCommand,
            Commands,
            Command,
            Answer,
            AdaptationAnswer,
            Rollback,
            RemedyReport,
            RemedyProposal,
            RemedyAnswer,
            RemedyVerdict,
            Finish,
        ),
    ),
    (
        "Tamiyo",
        (
            Snapshot,
            StepValues,
            Active,
            Frames,
            Proposal,
            PlanProposal,
            Decline,
            Verdict,
            Heartbeat,
        ),
    ),
)
