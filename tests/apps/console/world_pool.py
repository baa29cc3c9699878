"""Workers and jobs in every state, and recipes with their launches."""

from __future__ import annotations

from datetime import timedelta

from django.utils import timezone

from apps.kernels.models import CacheCounter
from apps.recipes.models import Launch, LogChunk, Recipe, StoredState
from apps.workers.models import CompileJob, JobStepDone, Worker
from esper.contracts import (
    JobState,
    JobStep,
    LaunchState,
)
from tests.apps.console.world_runs import World, layer_infos


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
        "adaptation_uid": world.adaptations["olgas"].uid,
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
        branch_argv=["{python}", "examples/digits_cnn.py", "--from", "{state}"],
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
        "requested_by": world.people["olga"],
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
    running = world.launches["running"]
    for name, step in (("step-250.pt", 250), ("kept-200.pt", 200)):
        StoredState.objects.create(
            launch=running, name=name, step=step, size_bytes=214_016, written_at=timezone.now()
        )
    branch = {"branch_of": running, "branch_step": 200, "branch_state": "kept-200.pt"}
    world.launches["branch"] = Launch.objects.create(
        **{**common, **branch, "parameters": {"steps": 10_000, "schedule": "linear"}},
        state=LaunchState.STOPPED,
        reason="stopped by olga",
        branch_digest="ab" * 32,
        ended_at=timezone.now(),
    )
    lines = "".join(f"step {step}  loss 0.{99 - step % 90}\n" for step in range(200))
    for launch in world.launches.values():
        LogChunk.objects.create(launch=launch, offset=0, length=len(lines), text=lines)
        Launch.objects.filter(pk=launch.pk).update(log_end=len(lines))
