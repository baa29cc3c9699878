"""Between the protocol's JSON and our dataclasses."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from esper.contracts import (
    AdaptationState,
    Decision,
    Declined,
    Experience,
    GraftKind,
    HealthFrame,
    LayerHistory,
    LayerInfo,
    Reward,
    Risk,
    RunMode,
    RunSnapshot,
    SafetyPolicy,
    Verdict,
    codec,
    unpack_values,
)
from esper.exceptions import CodecError


@dataclass(frozen=True, slots=True)
class ActiveAdaptation:
    """An adaptation that is under way on a run; ``graft_step`` -1: not in the model yet."""

    uid: str
    state: AdaptationState
    layer: str
    blueprint: str
    kind: GraftKind
    risk: Risk
    graft_step: int = -1


@dataclass(frozen=True, slots=True)
class RunReport:
    """What ``GET runs/{uid}/snapshot`` says: all that ``decide`` and ``judge`` need.

    Attributes:
        ablation_gains: by adaptation uid; the newest one that the trainer has measured.
        newest_wall_time: of the newest frame, the trainer's clock; NaN: no frame.
    """

    snapshot: RunSnapshot
    limits: SafetyPolicy
    active: tuple[ActiveAdaptation, ...]
    ablation_gains: dict[str, float] = field(default_factory=dict)
    newest_wall_time: float = math.nan


def report_from_wire(data: Mapping[str, Any]) -> RunReport:
    """Raises ``CodecError`` when it is not a snapshot."""
    try:
        layers = tuple(LayerInfo.from_wire(layer) for layer in data["layers"])
        names = tuple(layer.name for layer in layers)
        frames = tuple(frame_from_wire(frame, names) for frame in data["frames"])
        steps, loss = _loss_series(data["metrics"])
        snapshot = RunSnapshot(
            run=data["run"],
            epoch=data["epoch"],
            mode=RunMode(data["mode"]),
            step=data["step"],
            layers=layers,
            frames=frames,
            loss_steps=steps,
            loss=loss,
            history={
                name: LayerHistory(**{**item, "grafts": tuple(item["grafts"])})
                for name, item in data["history"].items()
            },
            experience={
                slug: experience_from_wire(item) for slug, item in data["experience"].items()
            },
            disabled_blueprints=frozenset(data["disabled_blueprints"]),
            model_parameters=data["model_parameters"],
            added_parameters=data["added_parameters"],
            adaptations_today=data["adaptations_today"],
            in_flight=data["in_flight"],
            last_adaptation_step=data["last_adaptation_step"],
            frozen=data["frozen"],
        )
        return RunReport(
            snapshot=snapshot,
            limits=SafetyPolicy.from_wire(data["safety_policy"]),
            active=tuple(_active_from_wire(item) for item in data["active"]),
            ablation_gains=_ablation_gains(data["metrics"]),
            newest_wall_time=frames[-1].wall_time if frames else math.nan,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CodecError(f"not a run's snapshot: {error!r}") from error


def frame_from_wire(data: Mapping[str, Any], layers: tuple[str, ...]) -> HealthFrame:
    return HealthFrame(
        step=data["step"],
        wall_time=codec.number_from_wire(data["wall_time"]),
        layers=layers,
        values=unpack_values(data["values"], len(layers)),
    )


def experience_from_wire(data: Mapping[str, Any]) -> Experience:
    reward = data.get("mean_reward")
    return Experience(
        kept=data["kept"],
        rolled_back=data["rolled_back"],
        mean_reward=math.nan if reward is None else codec.number_from_wire(reward),
    )


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
    return (
        f"{run}:{epoch}:{decision.step}:{adaptation.layer_name}:{adaptation.adaptation_type}"
    )


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


def age_seconds(wall_time: float) -> float:
    """How old a moment is; clocks of two machines may differ, so never below zero. NaN stays."""
    age = time.time() - wall_time
    return 0.0 if age < 0 else age


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
    )


def _loss_series(metrics: list[dict[str, Any]]) -> tuple[Any, Any]:
    found = {
        item["step"]: codec.number_from_wire(item["values"]["loss"])
        for item in metrics
        if "loss" in item["values"]
    }
    steps = np.array(sorted(found), dtype=np.int64)
    return steps, np.array([found[step] for step in steps.tolist()], dtype=np.float64)


def _ablation_gains(metrics: list[dict[str, Any]]) -> dict[str, float]:
    prefix = "ablation_gain:"
    return {
        name.removeprefix(prefix): codec.number_from_wire(value)
        for item in metrics
        for name, value in item["values"].items()
        if name.startswith(prefix)
    }
