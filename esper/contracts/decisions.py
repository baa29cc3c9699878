"""Proposals, checks, decisions, verdicts and rewards, with the reasons of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypeAlias

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from esper.contracts import wire
from esper.contracts.enums import AdaptationType, Risk, RunMode, ViolationRule
from esper.contracts.health import Finding, HealthFrame, LayerInfo
from esper.contracts.percent import percent, signed
from esper.contracts.variants import Variant
from esper.contracts.wire import Int64, Number, Sentence, Whole
from esper.exceptions import CodecError, ConfigurationError, UnknownAdaptationTypeError

Slug: TypeAlias = Annotated[str, Meta(min_length=1, max_length=60)]  # of a blueprint


# A smaller model counts as one of this size: a tiny one may need to become many times as large.
SMALLEST_BUDGETED = 100_000


@dataclass(frozen=True, slots=True)
class Reason:
    """One signal's share in a decision: ``weight`` > 0 supports it, < 0 opposes it."""

    signal: Annotated[str, Meta(min_length=1, max_length=120)]
    observed: Number  # NaN: unknown
    weight: Number
    text: Sentence


@dataclass(frozen=True, slots=True)
class AdaptationDecision:
    """What Tamiyo proposes: a kind of adaptation for one layer.

    Attributes:
        layer_name: a layer of the run.
        adaptation_type: a member of :class:`AdaptationType`; a text is converted.
        confidence: probability that the adaptation really helps, 0..1. NaN leaves it to the cases,
            and never counts as high.
        urgency: how fast the layer gets worse, 0..1.
        reasons: the signals for and against it.
        since: an earlier layer whose input it reads, for a graft that spans layers.

    Raises:
        UnknownAdaptationTypeError: the type is not a member; there is no default.
    """

    layer_name: str
    adaptation_type: AdaptationType
    confidence: float
    urgency: float = 0.0
    reasons: tuple[Reason, ...] = ()
    since: str = ""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "adaptation_type", AdaptationType(self.adaptation_type))
        except ValueError:
            raise UnknownAdaptationTypeError(str(self.adaptation_type), AdaptationType) from None
        for name in ("confidence", "urgency"):
            value = getattr(self, name)
            if math.isfinite(value) and not 0.0 <= value <= 1.0:
                raise CodecError(f"{name} is a probability, got {value}")


@dataclass(frozen=True, slots=True)
class CostForecast:
    """What a blueprint will cost at one layer, computed from shapes; measured numbers replace it.

    ``memory_mib`` counts parameters + gradients + two moments + activations kept for backward.
    """

    parameters: Whole
    flops: Whole  # per forward pass of the layer's sample shape
    memory_mib: Number
    latency_ms: Number  # forward; NaN where there is no basis for a forecast

    def to_wire(self) -> dict[str, Any]:
        members: dict[str, Any] = wire.to_wire(self)
        return members

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> CostForecast:
        """Raises ``MessageError``."""
        return wire.from_wire(cls, data)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A blueprint at one size for one layer, scored."""

    blueprint: str  # slug
    config: dict[str, Any]
    score: float
    forecast: CostForecast
    terms: dict[str, float] = field(default_factory=dict)  # score = sum of these
    variant: str = ""  # uid, where the size is that of an admitted variant


@dataclass(frozen=True, slots=True)
class WhyNot:
    """Why a blueprint was not chosen."""

    blueprint: Slug
    reason: Sentence


@dataclass(frozen=True, slots=True)
class Selection:
    """``best`` is None when nothing fits; ``why_not`` has a line for every other blueprint."""

    best: Candidate | None
    why_not: tuple[WhyNot, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """One gate or limit. ``passed`` None means unknown, and unknown never counts as passed.

    A hard check that did not pass declines the adaptation; a soft one asks a person.
    """

    rule: ViolationRule
    passed: bool | None
    hard: bool
    observed: Annotated[str, Meta(max_length=500)]
    limit: Annotated[str, Meta(max_length=500)]
    text: Sentence

    @property
    def blocks(self) -> bool:
        return self.hard and self.passed is not True

    @property
    def asks(self) -> bool:
        return not self.hard and self.passed is not True


@dataclass(frozen=True, slots=True)
class SafetyPolicy:
    """All thresholds of the gates, in one versioned record. Each edit by a person has a reason.

    confidence: refuse < ``confidence_refuse`` <= **ask** < ``confidence_auto`` <= auto
    """

    name: str = "default"
    version: int = 1
    confidence_refuse: float = 0.05
    confidence_auto: float = 0.75
    auto_max_risk: Risk = Risk.LOW
    min_cases_for_auto: int = 20  # closed cases of the category; below, MEDIUM and up ask
    approvals_for_high_risk: int = 1  # by different people
    cooldown_layer_steps: int = 400
    cooldown_run_steps: int = 100
    cooldown_rollback_factor: float = 2.0
    cooldown_refused_seconds: int = 1800  # a fast run passes any number of steps in a second
    max_in_flight_per_run: int = 2  # a plan counts as one
    max_plan_changes: int = 1  # of one plan, which is decided on as a whole; 1: no plans
    max_adaptations_per_day: int = 20
    max_added_parameters_ratio: float = 2.0  # of the model's parameters at attach, or of 100,000
    max_memory_mib: float = 1024.0  # of one graft
    max_latency_ms: float = 10.0  # of one graft, forward
    evidence_max_age_seconds: float = 120.0
    approval_timeout_seconds: int = 900
    dispatch_timeout_seconds: int = 60
    maturity_steps: int = 100  # a newborn's warm-up; nothing of it counts
    probation_steps: int = 600  # no test runs longer; without a shown gain the graft goes
    probation_looks: int = 20  # at most so many evaluations with the graft and without it
    probation_cost_ratio: float = 0.1  # of the training time, for these evaluations
    probation_timeout_seconds: int = 3600
    min_gain_ratio: float = 0.005  # smallest gain that matters, a share of the held-out loss
    max_loss_increase_ratio: float = 0.05  # against the forecast; more is harmful
    error_budget_ratio: float = 0.1  # harm that a run may take, a share of its loss; then observe

    def __post_init__(self) -> None:
        if not 0.0 <= self.confidence_refuse <= self.confidence_auto <= 1.0:
            raise CodecError(
                "0 <= confidence_refuse <= confidence_auto <= 1 must hold, got "
                f"{self.confidence_refuse} and {self.confidence_auto}"
            )
        object.__setattr__(self, "auto_max_risk", Risk(self.auto_max_risk))
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
                raise CodecError(f"{name} must be a finite number >= 0, got {value}")

    def most_added_parameters(self, model_parameters: int) -> int:
        """How many parameters all grafts of a model of this size may have."""
        return int(self.max_added_parameters_ratio * max(model_parameters, SMALLEST_BUDGETED))

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> SafetyPolicy:
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise CodecError(f"not a safety policy: {error}") from error


def cost_limits(limits: Mapping[str, float]) -> dict[str, float]:
    """Converts limits with the seed document's names to names and units of ``SafetyPolicy``.

    ``max_memory_mb`` (10^6 bytes) becomes ``max_memory_mib``; ``max_latency_ms`` stays.

    Raises:
        ConfigurationError: an unknown limit, or a value that is not a finite number >= 0.
    """
    names = {
        "max_memory_mb": ("max_memory_mib", 1e6 / 2**20),
        "max_latency_ms": ("max_latency_ms", 1.0),
    }
    found = {}
    for name, value in limits.items():
        if name not in names:
            raise ConfigurationError(f"unknown limit {name!r}; known are: {', '.join(names)}")
        if isinstance(value, bool) or not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"{name} must be a finite number >= 0, got {value!r}")
        field_name, factor = names[name]
        found[field_name] = value * factor
    return found


@dataclass(frozen=True, slots=True)
class LayerHistory:
    """The adaptations of a layer so far.

    ``last_adaptation_step`` -1 means never. ``grafts`` are the slugs of its present grafts.
    ``refused_seconds`` is the time since a person rejected a proposal for it, or let one expire;
    inf means never.
    """

    grafts: tuple[str, ...] = ()
    in_flight: bool = False
    last_adaptation_step: Int64 = -1
    last_rolled_back: bool = False
    refused_seconds: Number = math.inf


@dataclass(frozen=True, slots=True)
class Experience:
    """Closed cases of one blueprint: how often it was kept, and its mean reward."""

    kept: Whole = 0
    rolled_back: Whole = 0
    mean_reward: Number = math.nan

    @property
    def cases(self) -> int:
        return self.kept + self.rolled_back


@dataclass(frozen=True, slots=True, eq=False)
class RunSnapshot:
    """All inputs of ``decide``; a stored snapshot makes its decision replayable.

    Shape legend: T samples of the loss.

    Attributes:
        loss_steps: int64 [T], loss: float64 [T]; the recent training loss.
        frames: recent health frames, oldest first.
        history: by layer name; a missing layer has no history.
        experience: by blueprint slug.
        age_seconds: how old the newest frame is.
        findings: of the diagnosis, those that are open.
        held_out: newest held-out loss; NaN: unknown.
        variants: those that a curator has admitted.
    """

    run: str
    epoch: int
    mode: RunMode
    step: int
    layers: tuple[LayerInfo, ...]
    frames: tuple[HealthFrame, ...]
    loss_steps: NDArray[np.int64]
    loss: NDArray[np.float64]
    model_parameters: int
    added_parameters: int = 0
    adaptations_today: int = 0
    in_flight: int = 0
    last_adaptation_step: int = -1
    frozen: str = ""  # why adaptation is switched off; empty when it is on
    history: dict[str, LayerHistory] = field(default_factory=dict)
    experience: dict[str, Experience] = field(default_factory=dict)
    disabled_blueprints: frozenset[str] = frozenset()
    age_seconds: float = 0.0
    findings: tuple[Finding, ...] = ()
    held_out: float = math.nan
    variants: tuple[Variant, ...] = ()

    def layer(self, name: str) -> LayerInfo | None:
        return next((layer for layer in self.layers if layer.name == name), None)


@dataclass(frozen=True, slots=True)
class Decision:
    """A proposed graft. ``asks`` lists why a person must approve it.

    ``variant`` is the uid of the admitted variant that the size comes from; empty: of none.
    """

    adaptation: AdaptationDecision
    blueprint: str
    config: dict[str, Any]
    risk: Risk
    forecast: CostForecast
    checks: tuple[Check, ...]
    why_not: tuple[WhyNot, ...]
    evidence: dict[str, float]  # frozen numbers of the layer and the run; NaN: unknown
    step: int
    policy: str  # "heuristic-3"
    asks: tuple[str, ...] = ()
    variant: str = ""

    @property
    def automatic(self) -> bool:
        return not self.asks


@dataclass(frozen=True, slots=True)
class Plan:
    """Several grafts of one run, chosen together, approved once and undone as a whole.

    Attributes:
        members: in the order in which they are applied.
        value: of the whole, in the units of ``Candidate.score``.
        parameters, memory_mib, latency_ms: the limits of the sum of all members.
        reasons: which limit binds, what excludes what, and what belongs together; a sentence each.
        asks: why a person decides on it.
        best: it is shown that no other set within the limits is worth more.
    """

    members: tuple[Decision, ...]
    value: float
    parameters: int
    memory_mib: float
    latency_ms: float
    reasons: tuple[str, ...]
    asks: tuple[str, ...]
    step: int
    policy: str
    best: bool = True

    def __len__(self) -> int:
        return len(self.members)


@dataclass(frozen=True, slots=True)
class Declined:
    """No graft, and why. ``violations`` are the hard checks that did not pass."""

    step: int
    reasons: tuple[str, ...]
    adaptation: AdaptationDecision | None = None
    checks: tuple[Check, ...] = ()
    why_not: tuple[WhyNot, ...] = ()

    @property
    def violations(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.blocks)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of probation, with the numbers behind it (losses: lower is better).

    ``ablation_gain``: loss with the graft off minus on, same held-out batches, mean of the looks;
    ``ablation_low`` and ``ablation_high`` are its 95 % interval.
    ``forecast_gain``: extrapolated loss without the graft minus the observed one.
    """

    keep: bool
    reason: str
    ablation_gain: float = math.nan
    ablation_low: float = math.nan
    ablation_high: float = math.nan
    forecast_gain: float = math.nan
    forecast_interval: float = math.nan  # half width, 95 %
    steps_observed: int = 0


@dataclass(frozen=True, slots=True)
class RunningTest:
    """Where the test of a graft in probation stands. Gains are shares of the loss; NaN: unknown.

    Attributes:
        steps: since the graft; the test ends at ``most_steps``.
        looks: evaluations with the graft and without it that count.
        gain, gain_low, gain_high: of the held-out loss, with its 95 % interval.
        keep_above: the interval above it keeps the graft.
        out_below: the interval below it takes the graft out.
        forecast_gain, forecast_interval: of the training loss against the unchanged run's forecast.
    """

    steps: Whole
    most_steps: Whole
    looks: Whole
    gain: Number
    gain_low: Number
    gain_high: Number
    keep_above: float
    out_below: float
    forecast_gain: Number
    forecast_interval: Number

    def __str__(self) -> str:
        return f"step {self.steps:,} of at most {self.most_steps:,} of its test; {self._seen()}"

    def _seen(self) -> str:
        if not self.looks:
            if math.isnan(self.forecast_gain):
                return "nothing is measured yet"
            return (
                f"{signed(self.forecast_gain)} ± {percent(self.forecast_interval)} against the "
                "forecast, no held-out loss yet"
            )
        looks = f"{self.looks} look{'s' if self.looks > 1 else ''}"
        limits = f"kept above {signed(self.keep_above)}, out below {signed(self.out_below)}"
        if math.isnan(self.gain_low):
            return f"gain {signed(self.gain)}, no interval yet ({looks}; {limits})"
        return (
            f"gain {signed(self.gain)}, 95% interval {signed(self.gain_low)} to "
            f"{signed(self.gain_high)} ({looks}; {limits})"
        )


@dataclass(frozen=True, slots=True)
class Reward:
    """Gain per cost. ``total`` is the sum of ``terms``."""

    terms: dict[str, float]

    @property
    def total(self) -> float:
        return float(sum(self.terms.values()))
