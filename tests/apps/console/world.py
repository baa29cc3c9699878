"""A small world to look at: people, runs, adaptations in every interesting state."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.utils import timezone

from apps.accounts.actors import Actor, ActorKind
from apps.adaptations.models import Remedy
from apps.kernels.models import Kernel, SpeedUp
from apps.policies.models import PolicyVersion
from apps.policies.services import current_policy
from apps.runs.models import Command, Run
from apps.violations.services import record_violation
from apps.workers.models import CompileJob
from esper.contracts import (
    AdaptationState,
    CommandKind,
    CommandState,
    JobState,
    RemedyKind,
    RunState,
    Severity,
    SpeedUpState,
    ViolationRule,
)
from tests.apps.cast import PEOPLE, make_kernel, make_person, make_remedies
from tests.apps.console.world_pool import make_pool, make_recipes
from tests.apps.console.world_runs import (
    World,
    layer_infos,
    make_adaptation,
    make_blueprints,
    make_run,
    tell,
)

A = AdaptationState
EAGER_DIGEST = "ab" * 32
COMPILED_DIGEST = "ef" * 32


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


def make_measured_kernel() -> Kernel:
    return make_kernel(
        digest=EAGER_DIGEST,
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
        stage_ms={
            "specialise": 3.1,
            "certify": 12.0,
            "measure": 8.4,
            "inductor": 812.0,
            "child": 4_120.0,
        },
        build_ms=41.5,
        size_bytes=2100,
        uses=2,
        built_by="compile@host-a",
        last_used_at=timezone.now(),
    )


def make_kept(world: World) -> None:
    kernel = make_measured_kernel()
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
        decided_by=world.people["oscar"],
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


FOUND = {
    "rule": "diagnosis",
    "layer": "classifier.2",
    "severity": "critical",
    "observed": "the loss was above 1.557 3 times in a row, now 31.4",
    "limit": "1.557",
    "remedy": "look at the learning rate and at the batches before the jump; if the loss does not "
    "come back, return to a checkpoint before it",
    "slug": "loss_spike",
    "since_step": 5_804,
    "resolved_step": -1,
    "remedies": ["rewind"],
}


def make_remedies_of_run(world: World) -> None:
    """One that waits for a person, and one that was kept."""
    make_remedies()
    common: dict[str, Any] = {
        **{"adaptation_type": "", "blueprint": None, "policy": "", "layer": ""},
        **{"confidence": None, "urgency": None, "reasons": [], "why_not": []},
        **{"forecast_parameters": 0, "forecast_flops": 0, "forecast_memory_mib": None},
        **{"forecast_latency_ms": None, "evidence": {"loss": 31.4}},
    }
    make_adaptation(
        world,
        "rewind",
        "digits-cnn",
        A.AWAITING_APPROVAL,
        remedy="rewind",
        in_words="Rewind to step 5,800 and halve the learning rate",
        config={"step": 5800, "factor": 0.5},
        finding="loss_spike",
        found=FOUND,
        asks=["This run is supervised; a person decides."],
        **common,
    )
    kept = make_adaptation(
        world,
        "slower",
        "digits-cnn",
        A.KEPT,
        remedy="set_lr",
        in_words="Halve the learning rate",
        config={"factor": 0.5},
        finding="oscillating_loss",
        found={**FOUND, "slug": "oscillating_loss", "severity": "serious"},
        asks=[],
        decided_rule="policy v1: risk low needs no person, and it can be taken back",
        decided_at=timezone.now(),
        graft_step=world.runs["digits-cnn"].step // 2,
        pause_ms=1.2,
        digest_before="a" * 64,
        digest_after="a" * 64,
        details={"factor": 0.5},
        steps_observed=44,
        kept_at=timezone.now(),
        end_reason="“The loss oscillates” is over",
        **{**common, "risk": "low"},
    )
    tell(kept, A.PROPOSED, A.APPROVED, A.DISPATCHED, A.ACCEPTED, A.PROBATION, A.KEPT)


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
    compiled.blueprint_slug, compiled.pinned_by = "proj_lora_64", "olga"
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


def build_world(*, steps: int = 120) -> World:
    world = World()
    world.people = {name: make_person(name) for name in PEOPLE}
    make_blueprints(world)
    make_run(world, "digits-cnn", "rafi", steps=steps, state=RunState.RUNNING)
    make_run(world, "topics-lm", "olga", steps=steps, state=RunState.RUNNING)
    make_run(world, "baseline", "rafi", steps=steps, state=RunState.FINISHED)
    make_kept(world)
    tell(
        make_adaptation(world, "waiting", "digits-cnn", A.AWAITING_APPROVAL),
        A.PROPOSED,
    )
    tell(
        world.adaptations["waiting"], A.AWAITING_APPROVAL, actor=Actor(ActorKind.RULE, "policy v1")
    )
    make_adaptation(world, "olgas", "topics-lm", A.AWAITING_APPROVAL, layer="features.3")
    make_adaptation(
        world,
        "rolled_back",
        "digits-cnn",
        A.ROLLED_BACK,
        layer="features.3",
        blueprint=world.blueprints["proj_lora_64"],
        graft_step=world.runs["digits-cnn"].step // 2,
        end_reason="the loss rose 8 % above the forecast",
        decided_rule="policy v1: confidence 0.80 ≥ 0.75 and risk low",
        asks=[],
        ended_at=timezone.now(),
    )
    make_adaptation(
        world,
        "rejected",
        "baseline",
        A.REJECTED,
        decided_by=world.people["olga"],
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
        author=world.people["carl"],
    )
    return world
