"""Runs with telemetry, blueprints, and adaptations of them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
from django.db import transaction
from django.test import Client
from django.utils import timezone

from apps.accounts.actors import SYSTEM, Actor
from apps.accounts.models import User
from apps.adaptations.binding import shown_hash
from apps.adaptations.models import Adaptation
from apps.audit.services import record
from apps.blueprints.models import Blueprint
from apps.notifications.services import publish, run_topic
from apps.policies.services import current_policy
from apps.recipes.models import Launch
from apps.runs.models import Run
from apps.telemetry.models import Frame, Metric
from esper.contracts import (
    SIGNAL_INDEX,
    SIGNALS,
    AdaptationState,
    AdaptationType,
    LayerInfo,
    RunMode,
    RunState,
    Signal,
)
from tests.apps.cast import make_blueprint

A = AdaptationState


@dataclass
class World:
    """What was built, by name."""

    people: dict[str, User] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    blueprints: dict[str, Blueprint] = field(default_factory=dict)
    adaptations: dict[str, Adaptation] = field(default_factory=dict)
    launches: dict[str, Launch] = field(default_factory=dict)

    def client(self, who: str) -> Client:
        client = Client()
        client.force_login(self.people[who])
        return client


LAYERS = (
    ("features.0", "Conv2d", (32, 1, 8, 8), (32, 8, 8, 8), 80),
    ("features.3", "Conv2d", (32, 8, 8, 8), (32, 12, 8, 8), 876),
    ("features.6", "BatchNorm2d", (32, 12, 8, 8), (32, 12, 8, 8), 24),
    ("classifier.0", "Linear", (32, 192), (32, 24), 4632),
    ("classifier.2", "Linear", (32, 24), (32, 24), 600),
    ("classifier.4", "Linear", (32, 24), (32, 10), 250),
)


def layer_infos() -> list[LayerInfo]:
    names = [name for name, *_ in LAYERS]
    return [
        LayerInfo(
            name=name,
            kind=kind,
            in_shape=in_shape,
            out_shape=out_shape,
            dtype="float32",
            parameters=parameters,
            graftable=kind != "BatchNorm2d",
            reason="normalisation layers are not grafted" if kind == "BatchNorm2d" else "",
            features_in=in_shape[1],
            features_out=out_shape[1],
            order=order,
            feeds=tuple(names[order + 1 : order + 2]),
        )
        for order, (name, kind, in_shape, out_shape, parameters) in enumerate(LAYERS)
    ]


_BLUEPRINTS = (
    ("proj_lora_64", "BP-PROJ-LoRA-64", "Low-rank update", "efficiency", "parallel", "low"),
    ("proj_ia3", "BP-PROJ-IA3", "Per-channel gain", "efficiency", "scale", "low"),
    (
        "mlp_gelu_2048",
        "BP-MLP-GELU-2048",
        "Parallel GELU",
        "transformer",
        "parallel",
        "medium",
    ),
    ("attn_std", "BP-ATTN-STD", "Parallel self-attention", "transformer", "parallel", "medium"),
    (
        "mon_act_stats",
        "BP-MON-ACT-STATS",
        "Activation stats",
        "diagnostics",
        "observe",
        "none",
    ),
    ("clamp_grad_norm", "BP-CLAMP-GRAD-NORM", "Gradient bound", "diagnostics", "wrap", "low"),
)


def make_blueprints(world: World) -> None:
    for slug, ident, title, category, kind, risk in _BLUEPRINTS:
        world.blueprints[slug] = make_blueprint(
            slug,
            ident=ident,
            title=title,
            category=category,
            kind=kind,
            risk=risk,
            adaptation_type=AdaptationType.ADD_EFFICIENCY,
            mergeable=kind == "parallel" and risk == "low",
            idea="A low-rank path beside the layer; its last projection starts at zero.",
            source="Hu et al. 2021, arXiv:2106.09685",
            when="The layer's gradient is large but its weights have little rank left.",
            version="1f0c9d2e4b6a8c7e",
        )


def make_run(world: World, name: str, owner: str, *, steps: int, state: RunState) -> Run:
    ended = state in (RunState.FINISHED, RunState.FAILED)
    run = Run.objects.create(
        name=name,
        owner=world.people[owner],
        mode=RunMode.AUTOMATIC,
        state=state,
        host="host-a",
        versions={"torch": "2.13.0"},
        layers=[info.to_wire() for info in layer_infos()],
        model_parameters=6462,
        target_steps=steps * 2,
        step=steps,
        last_loss=0.43,
        last_seen_at=timezone.now(),
        ended_at=timezone.now() if ended else None,
    )
    world.runs[name] = run
    make_telemetry(run, steps)
    return run


def make_telemetry(run: Run, steps: int, *, every: int = 5) -> None:
    chance = random.Random(run.pk)
    now = timezone.now().timestamp()
    losses = [
        2.3 * math.exp(-step / (steps / 3)) + 0.4 + 0.05 * chance.random() for step in range(steps)
    ]
    Metric.objects.bulk_create(
        Metric(
            run=run,
            epoch=1,
            step=step,
            wall_time=now - steps + step,
            name="loss",
            value=losses[step],
        )
        for step in range(steps)
    )
    Metric.objects.create(run=run, epoch=1, step=steps, wall_time=now, name="step_ms", value=21.4)
    Frame.objects.bulk_create(
        Frame(run=run, epoch=1, step=step, wall_time=now, values=_frame(step / steps, chance))
        for step in range(0, steps, every)
    )


def _frame(progress: float, chance: random.Random) -> bytes:
    values = np.full((len(LAYERS), len(SIGNALS)), np.nan, dtype="<f4")
    for row in range(len(LAYERS)):
        sick = row == 4
        health = 0.86 - 0.03 * row - (0.55 * progress if sick else 0.0)
        values[row] = [chance.uniform(0.1, 1.0) for _ in SIGNALS]
        values[row, SIGNAL_INDEX[Signal.DEAD_FRACTION]] = 0.38 * progress if sick else 0.02
        values[row, SIGNAL_INDEX[Signal.HEALTH]] = health + chance.uniform(-0.04, 0.04)
    return values.tobytes()


def _check(rule: str, passed: bool | None, hard: bool, observed: str, limit: str) -> dict[str, Any]:
    text = f"{rule.replace('_', ' ')}: {observed}, the limit is {limit}."
    return {
        "rule": rule,
        "passed": passed,
        "hard": hard,
        "observed": observed,
        "limit": limit,
        "text": text,
    }


def make_adaptation(
    world: World, name: str, run: str, state: AdaptationState, **changes: Any
) -> Adaptation:
    found = world.runs[run]
    values: dict[str, Any] = {
        "run": found,
        "run_epoch": 1,
        "idempotency_key": f"{run}:{name}",
        "layer": "classifier.2",
        "adaptation_type": AdaptationType.ADD_EFFICIENCY,
        "blueprint": world.blueprints["mlp_gelu_2048"],
        "config": {"hidden": 64},
        "risk": "medium",
        "confidence": 0.66,
        "urgency": 0.4,
        "forecast_parameters": 3_160,
        "forecast_flops": 201_216,
        "forecast_memory_mib": 0.061,
        "forecast_latency_ms": 0.084,
        "policy": "heuristic-1",
        "safety_policy": current_policy(),
        "proposed_step": found.step - 40,
        "evidence": {"health": 0.34, "dead_fraction": 0.36, "loss": 0.45, "grad_snr": None},
        "reasons": [
            {
                "signal": "dead_fraction",
                "observed": 0.36,
                "weight": 0.31,
                "text": "36 % dead",
            },
            {
                "signal": "update_ratio",
                "observed": 1e-5,
                "weight": 0.22,
                "text": "tiny updates",
            },
            {
                "signal": "history",
                "observed": 1.0,
                "weight": -0.12,
                "text": "rolled back here",
            },
        ],
        "checks": [
            _check("memory", True, True, "0.06 MiB", "1024 MiB"),
            _check("cooldown", True, True, "0 steps left", "400 steps"),
            _check("confidence", False, False, "0.66", "0.75"),
        ],
        "why_not": [
            {"blueprint": "proj_lora_64", "reason": "the layer's rank is not the bottleneck"},
            {"blueprint": "attn_std", "reason": "needs a sequence axis"},
        ],
        "asks": ["Confidence 0.66 is below 0.75.", "Risk medium has 2 ended cases, 20 are needed."],
        "state": state,
        "deadline_at": timezone.now() + timedelta(minutes=11)
        if state == A.AWAITING_APPROVAL
        else None,
        **changes,
    }
    adaptation = Adaptation(**values)
    adaptation.evidence_hash = shown_hash(adaptation)
    adaptation.save()
    world.adaptations[name] = adaptation
    return adaptation


def tell(adaptation: Adaptation, *states: AdaptationState, actor: Actor = SYSTEM) -> None:
    """Write the audit rows and events that the lifecycle writes."""
    with transaction.atomic():
        for state in states:
            record(
                actor=actor,
                act=f"adaptation.{state}",
                object_kind="adaptation",
                object_uid=adaptation.uid,
                run_uid=adaptation.run.uid,
                data={"number": adaptation.number, "to": str(state)},
            )
            data = {"adaptation": adaptation.uid, "number": adaptation.number, "to": str(state)}
            publish(topic=run_topic(adaptation.run.uid), type="adaptation.changed", data=data)
            publish(topic="inbox", type="adaptation.changed", data=data)
