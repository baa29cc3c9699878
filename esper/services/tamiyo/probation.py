"""Judging a graft from what Tamiyo has received. Pure: the clock is an argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from esper import blueprints
from esper.contracts import CostForecast, LayerInfo, Reward, Verdict, codec
from esper.contracts.protocol import Active
from esper.exceptions import CodecError
from esper.reward import Judgement, LossWindow, compute_reward, held_out_level, judge
from esper.services.tamiyo.wire import RunReport

# Judge what is there a little before the server's deadline, which rolls back without looking.
DEADLINE_MARGIN_SECONDS = 5.0
_LEVEL_SAMPLES = 64


def judge_probation(report: RunReport, adaptation: Active, *, now: float) -> Judgement:
    """Keep it, take it out, or look again.

    Args:
        now: seconds since the epoch.
    """
    before, after = _windows(report, adaptation)
    return judge(
        before,
        after,
        graft_step=_graft_step(adaptation),
        policy=report.limits,
        kind=adaptation.kind,
        looks=report.looks.get(adaptation.uid, ()),
        serves_loss=not blueprints.get_blueprint(adaptation.blueprint).requires,
        deadline_reached=now >= adaptation.deadline_seconds - DEADLINE_MARGIN_SECONDS,
    )


def reward_of(
    verdict: Verdict, report: RunReport, adaptation: Active, cost: CostForecast
) -> Reward:
    """What the policy learns from this case."""
    before, _ = _windows(report, adaptation)
    recent = before.loss[-_LEVEL_SAMPLES:]
    finite = recent[np.isfinite(recent)]
    return compute_reward(
        verdict,
        loss_level=float(np.median(finite)) if finite.size else math.nan,
        held_out_level=held_out_level(report.looks.get(adaptation.uid, ())),
        cost=cost,
        model_parameters=report.snapshot.model_parameters,
        policy=report.limits,
    )


def cost_of(resource: Mapping[str, Any], layer: LayerInfo) -> CostForecast:
    """What an adaptation costs: by arithmetic, and as measured where it was.

    Args:
        resource: ``GET adaptations/{uid}``; ``blueprint``, ``config`` and ``certificate`` are read.
        layer: its place, which may span layers.

    Raises:
        CodecError: the resource does not say what was grafted.
        BlueprintError, ConfigurationError: this Esper cannot make it.
    """
    try:
        blueprint = blueprints.get_blueprint(_slug(resource["blueprint"]))
        cost = blueprint.forecast(layer, blueprint.config_for(layer, dict(resource["config"])))
    except (KeyError, TypeError, AttributeError) as error:
        raise CodecError(f"not an adaptation: {error!r}") from error
    measured = resource.get("certificate") or {}
    return replace(
        cost,
        memory_mib=_measured(measured, "memory_mib", cost.memory_mib),
        latency_ms=_measured(measured, "latency_ms", cost.latency_ms),
    )


def _measured(certificate: Mapping[str, Any], name: str, forecast: float) -> float:
    """The measured number, where there is one."""
    value = certificate.get(name)
    return forecast if value in (None, "nan") else codec.number_from_wire(value)


def _slug(blueprint: Any) -> str:
    return str(blueprint["slug"] if isinstance(blueprint, Mapping) else blueprint)


def _windows(report: RunReport, adaptation: Active) -> tuple[LossWindow, LossWindow]:
    snapshot = report.snapshot
    return LossWindow(snapshot.loss_steps, snapshot.loss).split(_graft_step(adaptation))


def _graft_step(adaptation: Active) -> int:
    return -1 if adaptation.graft_step is None else adaptation.graft_step
