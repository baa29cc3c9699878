"""A small world to look at: people, runs, adaptations in every interesting state."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from django.db import transaction
from django.test import Client
from django.utils import timezone

from apps.accounts.actors import SYSTEM, Actor, ActorKind
from apps.accounts.models import User
from apps.adaptations.models import Adaptation, Remedy
from apps.audit.services import record
from apps.blueprints.models import Blueprint
from apps.kernels.models import CacheCounter, Kernel, SpeedUp
from apps.notifications.services import publish, run_topic
from apps.policies.models import PolicyVersion
from apps.policies.services import current_policy
from apps.recipes.models import Launch, LogChunk, Recipe
from apps.runs.models import Command, Run
from apps.telemetry.models import Frame, Metric
from apps.violations.services import record_violation
from apps.workers.models import CompileJob, JobStepDone, Worker
from esper.contracts import (
    SIGNALS,
    AdaptationState,
    AdaptationType,
    CommandKind,
    CommandState,
    JobState,
    JobStep,
    LaunchState,
    LayerInfo,
    RemedyKind,
    Role,
    RunMode,
    RunState,
    Severity,
    SpeedUpState,
    ViolationRule,
)

PASSWORD = "a-long-password-for-tests"
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


def make_people(world: World) -> None:
    for name, role in (
        ("vera", Role.VIEWER),
        ("rosa", Role.RESEARCHER),
        ("anna", Role.OPERATOR),
        ("ben", Role.OPERATOR),
        ("cora", Role.CURATOR),
        ("adam", Role.ADMIN),
    ):
        world.people[name] = User.objects.create_user(name, password=PASSWORD, role=role)


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
        world.blueprints[slug] = Blueprint.objects.create(
            slug=slug,
            ident=ident,
            title=title,
            category=category,
            kind=kind,
            risk=risk,
            adaptation_type=AdaptationType.ADD_EFFICIENCY,
            mergeable=kind == "parallel" and risk == "low",
            idea="A low-rank path beside the layer; its last projection is zero at birth.",
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
        values[row, 6] = 0.38 * progress if sick else 0.02
        values[row, -1] = min(1.0, max(0.0, health + chance.uniform(-0.04, 0.04)))
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
        "evidence_hash": "9f3c" * 16,
        "state": state,
        "deadline_at": timezone.now() + timedelta(minutes=11)
        if state == A.AWAITING_APPROVAL
        else None,
        **changes,
    }
    adaptation = Adaptation.objects.create(**values)
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


CERTIFICATE = {
    "max_abs_diff": 0.0,
    "tolerance": 0.0,
    "preserving": True,
    "live": True,
    "rng_neutral": True,
    "parameters": 3160,
    "parameters_declared": 3160,
    "undo_exact": True,
    "host_untouched": True,
    "memory_mib": 0.058,
    "latency_ms": 0.091,
    "failures": [],
    "passed": True,
}


def make_kernel() -> Kernel:
    return Kernel.objects.create(
        digest="ab" * 32,
        key_hash="cd" * 32,
        blueprint_slug="mlp_gelu_2048",
        layer_kind="Linear",
        in_shape=[32, 24],
        dtype="float32",
        capability="cpu",
        device_name="a CPU",
        parameters=3160,
        latency_ms=0.091,
        memory_mib=0.058,
        forecast_latency_ms=0.084,
        forecast_memory_mib=0.061,
        forward_p50_ms=0.093,
        forward_p95_ms=0.127,
        backward_p50_ms=0.201,
        backward_p95_ms=0.288,
        peak_memory_mib=0.113,
        certificate=CERTIFICATE,
        stage_ms={"certify": 12.0},
        build_ms=41.5,
        size_bytes=2100,
        uses=2,
        built_by="compile@host-a",
        last_used_at=timezone.now(),
    )


def make_kept(world: World) -> None:
    kernel = make_kernel()
    job = CompileJob.objects.create(
        adaptation_uid="",
        run_uid=world.runs["digits-cnn"].uid,
        blueprint_slug="mlp_gelu_2048",
        layer=layer_infos()[4].to_wire(),
        capability="cpu",
        state=JobState.DONE,
        attempt=1,
        lease_owner="compile@host-a",
        kernel_digest=kernel.digest,
        build_ms=41.5,
        ended_at=timezone.now(),
    )
    kept = make_adaptation(
        world,
        "kept",
        "digits-cnn",
        A.KEPT,
        layer="classifier.0",
        job=job,
        kernel=kernel,
        graft_step=world.runs["digits-cnn"].step // 3,
        pause_ms=3.4,
        certificate=CERTIFICATE,
        decided_by=world.people["ben"],
        decided_at=timezone.now(),
        decision_reason="stagnant for long",
        ablation_gain=0.021,
        forecast_gain=0.034,
        forecast_interval=0.012,
        steps_observed=150,
        reward_terms={"gain": 0.62, "parameters": -0.08, "latency": -0.05, "pause": -0.01},
        reward=0.48,
        ended_at=timezone.now(),
        end_reason="the loss fell below the forecast",
    )
    CompileJob.objects.filter(pk=job.pk).update(adaptation_uid=kept.uid)
    tell(kept, A.PROPOSED, A.AWAITING_APPROVAL, A.APPROVED, A.COMPILE_QUEUED)
    tell(kept, A.COMPILING, A.COMPILED, A.DISPATCHED, A.ACCEPTED, A.PROBATION, A.KEPT)
    Run.objects.filter(pk=kept.run.pk).update(command_seq=1)
    Command.objects.create(
        run=kept.run,
        epoch=1,
        seq=1,
        kind=CommandKind.GRAFT,
        adaptation_uid=kept.uid,
        layer=kept.layer,
        issued_at=timezone.now(),
        expires_at=timezone.now(),
        signature="s",
        state=CommandState.APPLIED,
        step=kept.graft_step,
        pause_ms=3.4,
        acknowledged_at=timezone.now(),
    )


COMPILED_DIGEST = "ef" * 32


def make_merged(world: World) -> None:
    """A graft with a compiled kernel that the script has merged into its host since."""
    eager = Kernel.objects.get()
    merged = make_adaptation(
        world,
        "merged",
        "topics-lm",
        A.KEPT,
        layer="classifier.0",
        blueprint=world.blueprints["proj_lora_64"],
        kernel=eager,
        graft_step=20,
        certificate=CERTIFICATE,
        merged_at=timezone.now(),
        ended_at=timezone.now(),
        decided_rule="policy v1",
        asks=[],
    )
    compiled = Kernel.objects.get()
    compiled.pk, compiled.digest, compiled.key_hash, compiled.tier = None, COMPILED_DIGEST, "01", 1
    compiled.blueprint_slug, compiled.pinned_by = "proj_lora_64", "anna"
    compiled.save(force_insert=True)
    SpeedUp.objects.create(
        adaptation_uid=merged.uid,
        run_uid=merged.run.uid,
        layer=merged.layer,
        blueprint_slug="proj_lora_64",
        capability="cpu",
        state=SpeedUpState.SWAPPED_IN,
        text="compiled 1.31×, swapped in",
        kernel=compiled,
        worker_speedup=1.27,
        speedup=1.31,
        ended_at=timezone.now(),
    )
    SpeedUp.objects.create(
        adaptation_uid=world.adaptations["kept"].uid,
        run_uid=world.runs["digits-cnn"].uid,
        layer="classifier.0",
        blueprint_slug="mlp_gelu_2048",
        capability="cpu",
        state=SpeedUpState.KEPT_EAGER,
        text="compiled 0.94×, kept eager",
        worker_speedup=1.02,
        speedup=0.94,
        ended_at=timezone.now(),
    )
    Command.objects.create(
        run=merged.run,
        epoch=1,
        seq=1,
        kind=CommandKind.SPEED_UP,
        adaptation_uid=merged.uid,
        layer=merged.layer,
        issued_at=timezone.now(),
        expires_at=timezone.now(),
        signature="s",
        state=CommandState.APPLIED,
        step=60,
        pause_ms=1.2,
        acknowledged_at=timezone.now(),
    )
    Run.objects.filter(pk=merged.run.pk).update(command_seq=1)
    Remedy.objects.create(
        run=merged.run,
        run_epoch=1,
        key="merge-1",
        kind=RemedyKind.MERGE,
        layer=merged.layer,
        step=90,
        pause_ms=2.1,
        digest_before="ab" * 32,
        digest_after="cd" * 32,
        adaptation=merged,
    )


def make_pool(world: World) -> None:
    """Workers of each kind, and a job in each state that there is."""
    now = timezone.now()
    common = {"started_at": now - timedelta(hours=2), "heartbeat_at": now}
    memory = {"memory_free_mib": 9_120, "memory_total_mib": 15_800}
    Worker.objects.create(
        name="compile@host-a",
        host="host-a",
        kind="compile",
        capabilities=["cpu"],
        queues=["compile.cpu", "host.host-a"],
        devices=[{"device": "cpu", "name": "a CPU", "capability": "cpu"}],
        versions={
            "torch": "2.13.0",
            "esper": "0.3.0",
            "builder_network": "closed by a network namespace",
        },
        state="busy",
        **common,
        **memory,
    )
    gpu = {"device": "cuda:0", "name": "NVIDIA H100", "capability": "cuda.sm90"}
    Worker.objects.create(
        name="compile@host-b",
        host="host-b",
        kind="compile",
        capabilities=["cuda.sm90"],
        queues=["compile.cuda.sm90", "host.host-b"],
        devices=[{**gpu, "memory_free_mib": 61_234, "memory_total_mib": 81_559}],
        state="idle",
        mode="quarantined",
        mode_reason="5 builders were lost in a row",
        mode_by="esper",
        mode_at=now,
        crashes=5,
        **common,
    )
    Worker.objects.create(
        name="control@host-a", host="host-a", queues=["control"], state="idle", **common, **memory
    )
    Worker.objects.create(
        name="tamiyo@host-a", host="host-a", kind="tamiyo", state="idle", **common
    )
    waiting = {
        "adaptation_uid": world.adaptations["annas"].uid,
        "run_uid": world.runs["topics-lm"].uid,
        "blueprint_slug": "mlp_gelu_2048",
        "layer": layer_infos()[4].to_wire(),
    }
    at_work = {"attempt": 2, "lease_owner": "compile@host-a", "started_at": now}
    running = CompileJob.objects.create(
        **waiting, **at_work, capability="cpu", state=JobState.RUNNING, error="killed"
    )
    for number, step in enumerate((JobStep.CLAIMED, JobStep.FORECAST)):
        JobStepDone.objects.create(
            job=running, attempt=2, step=step, at=now + timedelta(milliseconds=40 * number)
        )
    CompileJob.objects.create(**waiting, capability="cpu")
    why = "no running worker compiles for cuda.sm90"
    CompileJob.objects.create(**waiting, capability="cuda.sm90", waits_for=why)
    CompileJob.objects.create(
        **waiting,
        capability="cpu",
        state=JobState.FAILED,
        attempt=3,
        error="the builder ended with SIGSEGV",
        log="attempt 3 on compile@host-a: the builder ended with SIGSEGV\nFatal Python error",
        ended_at=now,
    )
    CacheCounter.objects.create(name="scrubbed", value=12)


def make_recipes(world: World) -> None:
    """One that runs, one that failed, and a file that cannot be used."""
    steps = {"name": "steps", "kind": "integer", "default": 10_000, "minimum": 100.0}
    blank = {"description": "", "maximum": None, "choices": [], "option": "", "under": ""}
    recipe = Recipe.objects.create(
        host="host-a",
        slug="digits_cnn",
        digest="0f" * 32,
        name="Digits",
        description="A small convolutional net.",
        argv=["{python}", "examples/digits_cnn.py", "--steps", "{steps}"],
        resume_argv=["{python}", "examples/digits_cnn.py", "--steps", "{steps}"],
        directory="/srv/esper",
        parameters=[
            {**blank, **steps, "maximum": 1e6, "description": "optimizer steps in all"},
            {
                **blank,
                "name": "schedule",
                "kind": "choice",
                "default": "cosine",
                "minimum": None,
                "choices": ["cosine", "linear"],
            },
        ],
        registered_at=timezone.now(),
    )
    Recipe.objects.create(
        host="host-a",
        slug="broken",
        name="broken.toml",
        problem="argv names {size}, which is no parameter.",
        registered_at=timezone.now(),
    )
    common = {
        "recipe": recipe,
        "digest": recipe.digest,
        "parameters": {"steps": 10_000, "schedule": "cosine"},
        "requested_by": world.people["anna"],
        "requested_at": timezone.now(),
        "command": ["python", "examples/digits_cnn.py", "--steps", "10000"],
    }
    world.launches["running"] = Launch.objects.create(
        **common,
        run_uid=world.runs["topics-lm"].uid,
        state=LaunchState.RUNNING,
        pid=4711,
        seen_at=timezone.now(),
    )
    world.launches["failed"] = Launch.objects.create(
        **common,
        state=LaunchState.FAILED,
        reason="killed by SIGKILL",
        exit_signal="SIGKILL",
        last_lines=["step 200  loss 0.61", "out of memory"],
        ended_at=timezone.now(),
    )
    lines = "".join(f"step {step}  loss 0.{99 - step % 90}\n" for step in range(200))
    for launch in world.launches.values():
        LogChunk.objects.create(launch=launch, offset=0, length=len(lines), text=lines)
        Launch.objects.filter(pk=launch.pk).update(log_end=len(lines))


def build_world(*, steps: int = 120) -> World:
    world = World()
    make_people(world)
    make_blueprints(world)
    make_run(world, "digits-cnn", "rosa", steps=steps, state=RunState.RUNNING)
    make_run(world, "topics-lm", "anna", steps=steps, state=RunState.RUNNING)
    make_run(world, "baseline", "rosa", steps=steps, state=RunState.FINISHED)
    make_kept(world)
    tell(
        make_adaptation(world, "waiting", "digits-cnn", A.AWAITING_APPROVAL),
        A.PROPOSED,
    )
    tell(
        world.adaptations["waiting"], A.AWAITING_APPROVAL, actor=Actor(ActorKind.RULE, "policy v1")
    )
    make_adaptation(world, "annas", "topics-lm", A.AWAITING_APPROVAL, layer="features.3")
    make_adaptation(
        world,
        "rolled_back",
        "digits-cnn",
        A.ROLLED_BACK,
        layer="features.3",
        blueprint=world.blueprints["proj_lora_64"],
        graft_step=world.runs["digits-cnn"].step // 2,
        end_reason="the loss rose 8 % above the forecast",
        decided_rule="policy v1: confidence 0.80 >= 0.75 and risk low",
        asks=[],
        ended_at=timezone.now(),
    )
    make_adaptation(
        world,
        "rejected",
        "baseline",
        A.REJECTED,
        decided_by=world.people["anna"],
        decided_at=timezone.now(),
        decision_reason="the run ends in a minute",
        ended_at=timezone.now(),
    )
    make_merged(world)
    make_pool(world)
    with transaction.atomic():
        record_violation(
            run=world.runs["topics-lm"],
            rule=ViolationRule.MEMORY,
            severity=Severity.SERIOUS,
            observed="1,101 MiB",
            limit="1,024 MiB",
            text="The graft would need 1,101 MiB, the limit is 1,024 MiB.",
            action="Nothing was grafted.",
            layer="features.3",
        )
    make_recipes(world)
    PolicyVersion.objects.create(
        version=2,
        values={**current_policy().values, "confidence_auto": 0.8},
        reason="more care in the first week",
        author=world.people["cora"],
    )
    return world


@pytest.fixture
def world(db: None) -> World:
    return build_world()
