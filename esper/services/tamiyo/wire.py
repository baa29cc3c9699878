"""Between the protocol's JSON and our dataclasses."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any

import numpy as np

from esper.contracts import (
    AdaptationState,
    Decision,
    Declined,
    GraftKind,
    Reward,
    Risk,
    RunSnapshot,
    SafetyPolicy,
    Verdict,
    codec,
)
from esper.exceptions import CodecError
from esper.replay import snapshot_from_wire


@dataclass(frozen=True, slots=True)
class ActiveAdaptation:
    """An adaptation that is under way on a run.

    Attributes:
        graft_step: -1: not in the model yet.
        deadline_at: seconds since the epoch; infinite: none.
    """

    uid: str
    state: AdaptationState
    layer: str
    blueprint: str
    kind: GraftKind
    risk: Risk
    graft_step: int = -1
    deadline_at: float = math.inf


@dataclass(frozen=True, slots=True)
class RunReport:
    """What ``GET runs/{uid}/snapshot`` says: all that ``decide`` and ``judge`` need.

    Attributes:
        ablation_gains: by adaptation uid; the newest one that the trainer has measured.
    """

    snapshot: RunSnapshot
    limits: SafetyPolicy
    active: tuple[ActiveAdaptation, ...]
    ablation_gains: dict[str, float] = field(default_factory=dict)


def report_from_wire(data: Mapping[str, Any]) -> RunReport:
    """Raises ``CodecError`` when it is not a run's snapshot."""
    try:
        return RunReport(
            snapshot=snapshot_from_wire({"age_seconds": _age_of_frames(data), **data}),
            limits=SafetyPolicy.from_wire(data["safety_policy"]),
            active=tuple(_active_from_wire(item) for item in data["active"]),
            ablation_gains=_ablation_gains(data["metrics"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CodecError(f"not a run's snapshot: {error!r}") from error


def proposal_to_wire(decision: Decision, *, epoch: int) -> dict[str, Any]:
    """Body of ``POST runs/{uid}/adaptations``."""
    return {
        "epoch": epoch,
        "step": decision.step,
        "layer": decision.adaptation.layer_name,
        "adaptation_type": str(decision.adaptation.adaptation_type),
        "confidence": codec.number_to_wire(decision.adaptation.confidence),
        "urgency": codec.number_to_wire(decision.adaptation.urgency),
        "reasons": to_wire(decision.adaptation.reasons),
        "blueprint": decision.blueprint,
        "config": decision.config,
        "risk": str(decision.risk),
        "forecast": to_wire(decision.forecast),
        "checks": to_wire(decision.checks),
        "why_not": to_wire(decision.why_not),
        "asks": list(decision.asks),
        "evidence": to_wire(decision.evidence),
        "policy": decision.policy,
    }


def proposal_key(run: str, epoch: int, decision: Decision) -> str:
    """Idempotency key: the same thought about the same moment is one proposal."""
    adaptation = decision.adaptation
    return f"{run}:{epoch}:{decision.step}:{adaptation.layer_name}:{adaptation.adaptation_type}"


def decline_to_wire(declined: Declined, *, epoch: int) -> dict[str, Any]:
    """Body of ``POST runs/{uid}/declines``; needs ``declined.adaptation``."""
    adaptation = declined.adaptation
    if adaptation is None:
        raise ValueError("only the refusal of a wish can be noted")
    return {
        "epoch": epoch,
        "step": declined.step,
        "layer": adaptation.layer_name,
        "adaptation_type": str(adaptation.adaptation_type),
        "confidence": codec.number_to_wire(adaptation.confidence),
        "reasons": list(declined.reasons),
        "checks": to_wire(declined.checks),
    }


def verdict_to_wire(verdict: Verdict, reward: Reward) -> dict[str, Any]:
    """Body of ``POST adaptations/{uid}/verdict``."""
    return {
        "keep": verdict.keep,
        "reason": verdict.reason,
        "ablation_gain": codec.number_to_wire(verdict.ablation_gain),
        "forecast_gain": codec.number_to_wire(verdict.forecast_gain),
        "forecast_interval": codec.number_to_wire(verdict.forecast_interval),
        "steps_observed": verdict.steps_observed,
        "reward": to_wire(reward.terms),
    }


def to_wire(value: Any) -> Any:
    """Dataclasses, tuples and non-finite numbers -> what strict JSON can say."""
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float | np.floating):
        return codec.number_to_wire(float(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_wire(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_wire(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_wire(item) for item in value]
    raise CodecError(f"{type(value).__name__} does not cross a border")


def _age_of_frames(data: Mapping[str, Any]) -> float | str:
    """By the trainer's clock, where the server does not tell; clocks differ, so never below 0."""
    if not data["frames"]:
        return "nan"
    wall_time = codec.number_from_wire(data["frames"][-1]["wall_time"])
    return codec.number_to_wire(max(0.0, time.time() - wall_time))


def _active_from_wire(data: Mapping[str, Any]) -> ActiveAdaptation:
    graft_step = data["graft_step"]
    return ActiveAdaptation(
        uid=data["uid"],
        state=AdaptationState(data["state"]),
        layer=data["layer"],
        blueprint=data["blueprint"],
        kind=GraftKind(data["kind"]),
        risk=Risk(data["risk"]),
        graft_step=-1 if graft_step is None else graft_step,
        deadline_at=_moment(data.get("deadline_at")),
    )


def _moment(text: str | None) -> float:
    """RFC 3339 -> seconds since the epoch; no text: never."""
    return datetime.fromisoformat(text).timestamp() if text else math.inf


def _ablation_gains(metrics: list[dict[str, Any]]) -> dict[str, float]:
    prefix = "ablation_gain:"
    return {
        name.removeprefix(prefix): codec.number_from_wire(value)
        for item in metrics
        for name, value in item["values"].items()
        if name.startswith(prefix)
    }
