"""What becomes of a job when builders crash, workers rest, and numbers turn out to be others."""

from __future__ import annotations

import concurrent.futures
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from apps.adaptations import compile_jobs, services
from apps.adaptations.compile_jobs import _measured_limits_hold
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.kernels.models import Kernel
from apps.notifications.models import OutboxMessage
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.violations.models import Violation
from apps.workers import builders
from apps.workers import services as workers
from apps.workers.models import CompileJob, Worker
from apps.workers.presence import database_between_forks
from apps.workers.selectors import current_jobs
from apps.workers.stalls import STALLED_SECONDS, WaitingJobs
from esper.compilation import BuilderPool, BuildLimits
from esper.contracts import (
    AdaptationState,
    JobState,
    JobStep,
    ViolationRule,
    WorkerKind,
    WorkerMode,
    WorkerState,
)
from tests.apps.cast import WORKER, make_kernel, make_layer
from tests.apps.stage import Stage

S = AdaptationState
ODD = (sys.executable, str(Path(__file__).parents[2] / "esper" / "compilation" / "odd_builder.py"))


def live_worker(name: str = "compile@here", capability: str = "cpu", **changes: Any) -> Worker:
    presence = workers.Presence(
        name=name,
        kind=WorkerKind.COMPILE,
        host="here",
        started_at=timezone.now(),
        capabilities=[capability],
        queues=[f"compile.{capability}", "host.here"],
        **changes,
    )
    workers.heartbeat(presence)
    return Worker.objects.get(name=name)


@pytest.fixture(scope="module")
def odd_pool() -> Iterator[BuilderPool]:
    pool = BuilderPool(BuildLimits(300.0, 512), size=2, argv=ODD)
    yield pool
    pool.close()


@pytest.fixture
def odd_builders(
    odd_pool: BuilderPool,
    settings: Any,
    tmp_path: Path,
    kernel_private_key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Children that go wrong where a layer's name says so; else real ones, really signed for."""
    (tmp_path / "kernel.key").write_text(kernel_private_key)
    settings.ESPER_KERNEL_KEY_FILE = str(tmp_path / "kernel.key")
    settings.ESPER_KERNEL_STORE_DIR = tmp_path / "kernels"
    monkeypatch.setattr(builders, "_pool", odd_pool)


def proposed_at(stage: Stage, name: str, **changes: Any) -> Adaptation:
    """An approved adaptation of a layer by this name, with its job in the queue."""
    stage.run.layers = [*stage.run.layers, make_layer(name, **changes).to_wire()]
    stage.run.save()
    return stage.propose(layer=name)


def test_a_worker_that_was_started_again_has_the_devices_that_it_reports_itself(db: None) -> None:
    card = [{"device": "cuda:0"}]
    before = live_worker(devices=card)
    assert before.devices == card
    workers.heartbeat(
        workers.Presence(
            name=before.name, kind=before.kind, host="here", started_at=before.started_at
        )
    )
    before.refresh_from_db()
    assert (before.devices, before.queues) == (card, ["compile.cpu", "host.here"])
    assert live_worker().devices == []


def looks_until_stalled(name: str = "compile@here", *, queues: Sequence[str]) -> int | None:
    """How many heartbeats it takes; None: it is not seen in twice the time."""
    jobs = WaitingJobs()
    for look in range(1, 2 * int(STALLED_SECONDS)):
        if jobs.stalled(name, queues):
            return look
    return None


def test_a_worker_that_gets_no_messages_although_a_job_waits_is_noticed(
    stage: Stage, settings: Any
) -> None:
    settings.ESPER_WORKER_HEARTBEAT_SECONDS = 1
    queues = live_worker(devices=[{"device": "cpu"}]).queues
    assert looks_until_stalled(queues=queues) is None  # no job
    job = stage.propose().job
    assert looks_until_stalled(queues=queues) == STALLED_SECONDS + 1
    assert looks_until_stalled(queues=["compile.cuda.sm90"]) is None  # not for this one
    Worker.objects.update(mode=WorkerMode.DRAINING)
    assert looks_until_stalled(queues=queues) is None  # it must not take any
    Worker.objects.update(mode=WorkerMode.ACTIVE, devices=[])
    assert looks_until_stalled(queues=queues) is None  # its builder is not ready
    live_worker(devices=[{"device": "cpu"}])
    assert workers.claim_job(job, worker="compile@other")
    assert looks_until_stalled(queues=queues) is None  # taken
    workers.fail_job(job, error="tried", permanent=False)
    assert looks_until_stalled(queues=queues) == STALLED_SECONDS + 1
    other = proposed_at(stage, "another").job
    assert workers.claim_job(other, worker="compile@here")
    assert looks_until_stalled(queues=queues) is None  # it builds this one


# --- builds ---------------------------------------------------------------------------------------


def test_a_job_is_built_by_a_child_signed_by_its_worker_and_reused(
    stage: Stage, odd_builders: None
) -> None:
    live_worker()
    first, second = stage.propose(), stage.propose(layer="head")
    for adaptation in (first, second):
        adaptation.refresh_from_db()
        assert adaptation.job is not None
        services.compile_kernel(adaptation.job.uid, worker="compile@here")

    jobs = CompileJob.objects.order_by("id")
    assert [(job.state, job.cached) for job in jobs] == [("done", False), ("done", True)]
    steps = list(jobs[0].steps.values_list("step", flat=True))
    assert steps == list(JobStep)
    assert list(jobs[1].steps.values_list("step", flat=True)) == ["claimed", "forecast"]
    kernel = Kernel.objects.get()
    assert kernel.forward_p95_ms is not None
    assert kernel.backward_p50_ms is not None
    assert kernel.peak_memory_mib is not None
    assert kernel.forecast_memory_mib is not None
    assert {row.state for row in Adaptation.objects.all()} == {S.COMPILED}


def test_a_job_that_kills_its_builder_is_tried_three_times_and_keeps_the_log(
    stage: Stage, odd_builders: None
) -> None:
    worker = live_worker()
    adaptation = proposed_at(stage, "segfault")
    job = CompileJob.objects.get()
    for _ in range(3):
        services.compile_kernel(job.uid, worker=worker.name)

    job.refresh_from_db()
    adaptation.refresh_from_db()
    assert (job.state, adaptation.state) == (JobState.FAILED, S.COMPILE_FAILED)
    assert "killed by SIGSEGV" in job.error
    assert job.log.count("the last words") == 3
    assert "attempt 3 on compile@here" in job.log
    assert set(job.steps.values_list("attempt", "step")) == {
        (attempt, step) for attempt in (1, 2, 3) for step in ("claimed", "forecast")
    }
    assert "killed by SIGSEGV" in Violation.objects.get().text
    worker.refresh_from_db()
    assert (worker.crashes, worker.mode) == (3, WorkerMode.ACTIVE)

    # A build that goes well ends the row of crashes. The failure has begun a cooldown.
    stage.run.step += 1_000
    stage.run.save(update_fields=["step"])
    services.compile_kernel(_job_of(stage.propose()), worker=worker.name)
    worker.refresh_from_db()
    assert worker.crashes == 0


def _job_of(adaptation: Adaptation) -> str:
    adaptation.refresh_from_db()
    assert adaptation.job is not None
    return adaptation.job.uid


def test_a_forecast_over_the_limit_is_never_built(stage: Stage, odd_builders: None) -> None:
    live_worker()
    wide = {"in_shape": (64, 16384), "out_shape": (64, 16384)}
    features = {"features_in": 16384, "features_out": 16384, "parameters": 16384 * 16385}
    adaptation = proposed_at(stage, "endless", **wide, **features)
    policy = adaptation.safety_policy
    type(policy).objects.update(values=policy.values | {"max_memory_mib": 1.0})

    services.compile_kernel(_job_of(adaptation), worker="compile@here")

    adaptation.refresh_from_db()
    assert adaptation.state == S.COMPILE_FAILED
    violation = Violation.objects.get()
    assert violation.rule == ViolationRule.MEMORY
    assert not Kernel.objects.exists()


def test_a_log_keeps_its_end_when_it_grows_too_long(stage: Stage) -> None:
    stage.propose()
    job = CompileJob.objects.get()
    for attempt in (1, 2, 3):
        workers.claim_job(job, worker="w")
        workers.fail_job(job, error=f"no {attempt}", permanent=False, log="x" * 9000)
    job.refresh_from_db()
    assert len(job.log) == 16_000
    assert "attempt 3 on w: no 3" in job.log


def test_the_running_job_of_a_worker_is_shown_with_its_steps(stage: Stage) -> None:
    worker = live_worker()
    stage.propose()
    job = CompileJob.objects.get()
    workers.claim_job(job, worker=worker.name)
    workers.note_steps(job, {JobStep.FORECAST: timezone.now()})
    workers.note_steps(job, {JobStep.FORECAST: timezone.now()})  # twice does no harm
    live_worker()

    worker.refresh_from_db()
    assert worker.state == WorkerState.BUSY
    shown = current_jobs([worker])[worker.name]
    assert [step.step for step in shown.steps.all()] == ["claimed", "forecast"]


# --- fences ---------------------------------------------------------------------------------------


def test_a_late_attempt_leaves_no_kernel_behind(
    stage: Stage, odd_builders: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker was frozen; while it built, its lease was lost and another one took the job."""
    adaptation = stage.propose()
    build = compile_jobs._build_or_reuse

    def frozen_meanwhile(job: CompileJob, progress: Any) -> Any:
        built = build(job, progress)
        CompileJob.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
        services.sweep()
        other = CompileJob.objects.get(pk=job.pk)
        assert workers.claim_job(other, worker="other@there")
        return built

    monkeypatch.setattr(compile_jobs, "_build_or_reuse", frozen_meanwhile)
    services.compile_kernel(_job_of(adaptation), worker="compile@here")

    job = CompileJob.objects.get()
    assert (job.state, job.attempt, job.lease_owner) == (JobState.RUNNING, 2, "other@there")
    assert not Kernel.objects.exists()


def test_a_second_task_message_while_a_job_is_built_changes_nothing(
    stage: Stage, odd_builders: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptation = stage.propose()
    build = compile_jobs._build_or_reuse

    def notified_meanwhile(job: CompileJob, progress: Any) -> Any:
        services.compile_kernel(job.uid, worker="other@there")
        return build(job, progress)

    monkeypatch.setattr(compile_jobs, "_build_or_reuse", notified_meanwhile)
    services.compile_kernel(_job_of(adaptation), worker="compile@here")

    job = CompileJob.objects.get()
    assert (job.state, job.attempt, job.lease_owner) == (JobState.DONE, 1, "compile@here")
    assert Kernel.objects.count() == 1


def test_a_build_whose_lease_was_taken_away_is_stopped(
    stage: Stage, odd_builders: None, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_worker()
    adaptation = proposed_at(stage, "endless")
    monkeypatch.setattr(builders.Progress, "leased", lambda progress: _gone(progress))

    services.compile_kernel(_job_of(adaptation), worker="compile@here")

    assert CompileJob.objects.get().state == JobState.RUNNING  # left to whoever has it now
    assert Worker.objects.get().crashes == 0


def _gone(progress: builders.Progress) -> Any:
    progress.lost.set()
    return nullcontext()


def test_a_process_does_not_fork_while_its_heartbeat_has_the_database_open() -> None:
    """Else the pool process that takes a killed one's place cannot read the database."""
    inside, forked = threading.Event(), threading.Event()

    def beat() -> None:
        with database_between_forks():
            inside.set()
            assert not forked.wait(0.5)

    def fork() -> None:
        assert inside.wait(300)
        child = os.fork()
        if not child:
            os._exit(0)
        forked.set()
        os.waitpid(child, 0)

    with concurrent.futures.ThreadPoolExecutor() as threads:
        for task in (threads.submit(beat), threads.submit(fork)):
            task.result(10)
    assert forked.is_set()


# --- workers that rest ----------------------------------------------------------------------------


def test_a_draining_worker_finishes_its_job_and_takes_no_other(stage: Stage) -> None:
    worker = live_worker()
    stage.propose()
    job = CompileJob.objects.get()
    assert workers.claim_job(job, worker=worker.name)
    workers.set_worker_mode(
        worker=worker, mode=WorkerMode.DRAINING, user=stage.operator, via="", reason="new driver"
    )

    assert workers.finish_job(job, kernel_digest=make_kernel().digest, cached=False, build_ms=1.0)
    stage.propose(layer="head")
    other = CompileJob.objects.latest("id")
    assert not workers.claim_job(other, worker=worker.name)
    assert not workers.queue_is_served("compile.cpu")
    assert live_worker().mode == WorkerMode.DRAINING  # a heartbeat does not end it

    workers.set_worker_mode(
        worker=worker, mode=WorkerMode.ACTIVE, user=stage.operator, via="", reason=""
    )
    assert workers.claim_job(other, worker=worker.name)
    events = AuditEvent.objects.filter(object_kind="worker").order_by("id")
    assert list(events.values_list("act", "actor")) == [
        ("worker.drained", "olga"),
        ("worker.released", "olga"),
    ]


def test_the_result_of_a_quarantined_worker_is_refused_and_its_job_goes_to_another(
    stage: Stage, odd_builders: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = live_worker()
    adaptation = stage.propose()
    build = compile_jobs._build_or_reuse

    def quarantined_meanwhile(job: CompileJob, progress: Any) -> Any:
        built = build(job, progress)
        workers.set_worker_mode(
            worker=worker,
            mode=WorkerMode.QUARANTINED,
            user=stage.operator,
            via="",
            reason="odd numbers",
        )
        return built

    monkeypatch.setattr(compile_jobs, "_build_or_reuse", quarantined_meanwhile)
    services.compile_kernel(_job_of(adaptation), worker=worker.name)

    job = CompileJob.objects.get()
    adaptation.refresh_from_db()
    assert (job.state, adaptation.state) == (JobState.QUEUED, S.COMPILE_QUEUED)
    assert "quarantine" in job.log
    assert not Kernel.objects.exists()
    assert not workers.claim_job(job, worker=worker.name)
    assert workers.claim_job(job, worker="other@there")


def test_too_many_lost_builders_in_a_row_put_their_worker_into_quarantine(
    stage: Stage, settings: Any
) -> None:
    worker = live_worker()
    for _ in range(settings.ESPER_WORKER_CRASHES_MAX):
        worker.refresh_from_db()
        assert worker.mode == WorkerMode.ACTIVE
        workers.note_lost_builder(worker.name)
    workers.note_lost_builder(worker.name)  # one more changes nothing

    worker.refresh_from_db()
    assert worker.mode == WorkerMode.QUARANTINED
    assert worker.mode_reason == "5 builders were lost in a row"
    event = AuditEvent.objects.get(object_kind="worker")
    assert (event.act, event.actor) == ("worker.quarantined", "system")
    Worker.objects.update(heartbeat_at=timezone.now() - timedelta(days=1))
    workers.mark_offline_workers()
    assert Worker.objects.get().mode == WorkerMode.QUARANTINED  # silence does not end it


@pytest.mark.parametrize("started_before_it_fell_silent", [True, False])
def test_a_tamiyo_that_was_started_again_is_not_called_offline(
    stage: Stage, started_before_it_fell_silent: bool
) -> None:
    """Two that run side by side are two: of them the silent one is missed."""
    now = timezone.now()
    silent, other = live_worker("tamiyo@here-1"), live_worker("tamiyo@here-2")
    Worker.objects.update(kind=WorkerKind.TAMIYO)
    Worker.objects.filter(pk=silent.pk).update(
        heartbeat_at=now - timedelta(minutes=5), started_at=now - timedelta(minutes=30)
    )
    minutes = 20 if started_before_it_fell_silent else 4
    Worker.objects.filter(pk=other.pk).update(started_at=now - timedelta(minutes=minutes))
    for _ in range(2):
        workers.mark_offline_workers()
    states = dict(Worker.objects.values_list("name", "state"))
    assert (states.pop("tamiyo@here-1", None) == WorkerState.OFFLINE) is (
        started_before_it_fell_silent
    )
    assert list(states.values()) == [WorkerState.IDLE]


def test_only_people_on_duty_with_a_reason_stop_a_compile_worker(stage: Stage) -> None:
    worker = live_worker()
    control = live_worker("control@here")
    Worker.objects.filter(pk=control.pk).update(kind=WorkerKind.CONTROL)
    control.refresh_from_db()
    drain = WorkerMode.DRAINING
    for who, which, reason, code in (
        (stage.viewer, worker, "because", "not-eligible"),
        (stage.operator, worker, " ", "reason-required"),
        (stage.operator, control, "because", "not-a-compile-worker"),
    ):
        with pytest.raises(Problem) as refused:
            workers.set_worker_mode(worker=which, mode=drain, user=who, via="", reason=reason)
        assert refused.value.code == code
    assert set(Worker.objects.values_list("mode", flat=True)) == {WorkerMode.ACTIVE}


# --- capabilities ---------------------------------------------------------------------------------


def test_a_job_that_nobody_can_do_says_so_and_expires_with_that_reason(stage: Stage) -> None:
    live_worker()
    Run.objects.update(capability="cuda.sm90")
    stage.run.refresh_from_db()
    adaptation = stage.propose()
    job = CompileJob.objects.get()
    assert job.waits_for == "no running worker compiles for cuda.sm90"

    Adaptation.objects.update(deadline_at=timezone.now() - timedelta(seconds=1))
    services.sweep()

    adaptation.refresh_from_db()
    assert adaptation.state == S.COMPILE_FAILED
    assert "no running worker compiles for cuda.sm90" in adaptation.end_reason


def test_the_reason_goes_when_a_worker_comes_and_comes_when_it_goes(stage: Stage) -> None:
    stage.propose()
    live_worker()
    services.sweep()
    assert CompileJob.objects.get().waits_for == ""
    workers.mark_worker_stopped("compile@here")
    services.sweep()
    assert CompileJob.objects.get().waits_for == "no running worker compiles for cpu"


def test_one_run_over_two_kinds_of_devices_gets_kernels_for_each(stage: Stage) -> None:
    stage.run.capabilities = {"cpu": "cpu", "cuda:0": "cuda.sm90"}
    stage.run.save()
    stage.propose()
    proposed_at(stage, "on0", device="cuda:0")

    wanted = ["cpu", "cuda.sm90"]
    jobs = CompileJob.objects.order_by("id")
    assert list(jobs.values_list("capability", flat=True)) == wanted
    messages = OutboxMessage.objects.filter(task="adaptations.compile").order_by("id")
    assert [message.queue for message in messages] == [f"compile.{name}" for name in wanted]


def test_what_was_measured_stands_beside_what_was_forecast(stage: Stage) -> None:
    adaptation = stage.propose()
    workers.claim_job(CompileJob.objects.get(), worker="w")
    transition(adaptation, S.COMPILING, actor=WORKER)
    transition(adaptation, S.COMPILED, actor=WORKER)
    kernel = make_kernel()
    kernel.forecast_memory_mib, kernel.peak_memory_mib = 3.0, 99_999.0

    assert not _measured_limits_hold(adaptation, kernel)

    violation = Violation.objects.get()
    assert violation.rule == ViolationRule.MEMORY
    assert violation.observed == "1e+05 MiB measured, 3 MiB forecast"
    assert "forecast 3 MiB" in violation.text
    assert adaptation.state == S.DECLINED
