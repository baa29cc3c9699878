"""From approved to compiled: what the task in the queue ``compile.<capability>`` does."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings
from django.db import transaction

from apps.accounts.actors import SYSTEM, Actor, ActorKind
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.kernels import services as kernels
from apps.kernels.models import Kernel
from apps.kernels.services import kernel_store, report_corrupt
from apps.notifications.services import enqueue
from apps.runs.services import lock_run
from apps.violations.services import record_violation
from apps.workers import services as workers
from apps.workers.models import CompileJob
from apps.workers.services import Progress, builders
from esper import tracing
from esper.compilation import BuildOrder, open_kernel
from esper.compilation.bundle import pack
from esper.constraints import check_forecast, check_measured
from esper.contracts import (
    AdaptationState,
    Certificate,
    Check,
    CostForecast,
    JobState,
    JobStep,
    KernelBundle,
    KernelKey,
    KernelReport,
    LayerInfo,
    Severity,
    ViolationRule,
)
from esper.exceptions import BuilderLostError, EsperError, KernelBuildError

log = logging.getLogger(__name__)

DISPATCH_TASK = "adaptations.dispatch"
STAGE_TASK = "adaptations.stage"


def queue_compilation(adaptation: Adaptation, *, layer: LayerInfo, actor: Actor) -> Adaptation:
    """Queue the job that builds the kernel. In the transaction of the approval."""
    job = workers.queue_job(
        adaptation_uid=adaptation.uid,
        run_uid=adaptation.run.uid,
        blueprint_slug=adaptation.grafted_blueprint.slug,
        config=adaptation.config,
        layer=layer.to_wire(),
        capability=adaptation.run.capability_of(layer.device),
    )
    return transition(adaptation, AdaptationState.COMPILE_QUEUED, actor=actor, job=job)


@dataclass(frozen=True, slots=True)
class _Built:
    """The result of an attempt: a kernel from the cache, or a new bundle in the store."""

    key: KernelKey
    cached: Kernel | None = None
    bundle: KernelBundle | None = None
    report: KernelReport | None = None
    build_ms: float = 0.0


class _ForecastOverLimitError(EsperError):
    """By its forecast the graft would break a limit; nothing was built."""

    def __init__(self, broken: list[Check]) -> None:
        super().__init__(" ".join(check.text for check in broken))
        self.broken = broken


def compile_kernel(job_uid: str, *, worker: str) -> None:
    """Claim the job, build or reuse the kernel, and queue its dispatch.

    Does nothing when another worker has the job or nobody needs it any more.
    """
    job = CompileJob.objects.get(uid=job_uid)
    actor = Actor(ActorKind.WORKER, worker)
    if not _start(job, worker, actor):
        return
    started = time.perf_counter()
    progress = Progress(job)
    try:
        with progress.leased(), tracing.span("build", adaptation=job.adaptation_uid):
            built = _build_or_reuse(job, progress)
    except BuilderLostError as error:
        if error.wanted:
            log.warning("job %s: %s", job.uid, error)
            return  # the lease was taken away, and the rows were moved then
        log.error("job %s: %s\n%s", job.uid, error, error.log)
        _fail(job, actor, str(error), permanent=False, builder_log=error.log, progress=progress)
        workers.note_lost_builder(worker)
    except _ForecastOverLimitError as error:
        _fail(job, actor, str(error), permanent=True, broken=error.broken, progress=progress)
    except KernelBuildError as error:
        _fail(job, actor, str(error), permanent=error.permanent, progress=progress)
    except EsperError as error:
        _fail(job, actor, str(error), permanent=True, progress=progress)
    except Exception as error:
        log.exception("job %s", job.uid)
        text = f"{type(error).__name__}: {error}"
        _fail(job, actor, text, permanent=False, progress=progress)
    else:
        build_ms = (time.perf_counter() - started) * 1e3
        _finish(job, actor, built, build_ms=build_ms, progress=progress)
        workers.note_good_build(worker)


@transaction.atomic
def _start(job: CompileJob, worker: str, actor: Actor) -> bool:
    adaptation = _locked(job)
    if adaptation.state == AdaptationState.COMPILING:
        return False  # a repeated message: the holder of the lease is building
    if adaptation.state != AdaptationState.COMPILE_QUEUED:
        workers.cancel_job(job)
        return False
    if not workers.claim_job(job, worker=worker):
        return False
    transition(adaptation, AdaptationState.COMPILING, actor=actor)
    return True


def _locked(job: CompileJob) -> Adaptation:
    adaptations = Adaptation.objects.select_related("run", "safety_policy", "blueprint")
    run_id = adaptations.values_list("run_id", flat=True).get(uid=job.adaptation_uid)
    lock_run(run_id)
    return adaptations.get(uid=job.adaptation_uid)


def _build_or_reuse(job: CompileJob, progress: Progress) -> _Built:
    """A builder child does everything that needs torch; this process never opens the device."""
    builder = builders().ready()
    order = BuildOrder(
        LayerInfo.from_wire(job.layer), job.blueprint_slug, job.config, job.capability
    )
    key, forecast = builder.specify(order)
    progress.note(JobStep.FORECAST)
    _check_forecast(job, forecast)
    cached = _stored_kernel(key)
    if cached is not None:
        return _Built(key, cached=cached)
    started = time.perf_counter()
    draft = builder.draft(
        order,
        on_step=lambda step, _: progress.note(JobStep(step)),
        stopped=progress.lost.is_set,
    )
    if draft.key != key:
        raise KernelBuildError(
            "the builder made a kernel with another key than it specified", permanent=False
        )
    bundle = pack(draft, private_key=Path(settings.ESPER_KERNEL_KEY_FILE).read_text().strip())
    progress.note(JobStep.SIGNED)
    kernel_store().put(bundle)
    progress.note(JobStep.STORED)
    build_ms = (time.perf_counter() - started) * 1e3
    _, _, report = open_kernel(bundle.files, bundle.digest, settings.ESPER_KERNEL_PUBLIC_KEY)
    return _Built(key, bundle=bundle, report=report, build_ms=build_ms)


def _check_forecast(job: CompileJob, forecast: CostForecast) -> None:
    adaptation = Adaptation.objects.select_related("safety_policy").get(uid=job.adaptation_uid)
    checks = check_forecast(forecast, adaptation.safety_policy.safety_policy())
    broken = [check for check in checks if check.blocks]
    if broken:
        raise _ForecastOverLimitError(broken)


def _stored_kernel(key: KernelKey) -> Kernel | None:
    """A kernel of this key whose files are there and whose signature still holds."""
    row = Kernel.objects.filter(key_hash=key.hash).first()
    store = kernel_store()
    if row is None or not store.has(row.digest):
        return None
    try:
        open_kernel(store.get(row.digest), row.digest, settings.ESPER_KERNEL_PUBLIC_KEY)
    except EsperError as error:
        log.warning("kernel %s cannot be used and is built again: %s", row.digest, error)
        report_corrupt(row, str(error))
        return None
    return row


@transaction.atomic
def _finish(
    job: CompileJob, actor: Actor, built: _Built, *, build_ms: float, progress: Progress
) -> None:
    adaptation = _locked(job)
    if not workers.holds_lease(job):
        log.warning("job %s: this attempt has lost its lease, its result is refused", job.uid)
        return
    if workers.is_quarantined(actor.name):
        reason = f"{actor.name} is in quarantine, its result is refused"
        _give_up_attempt(adaptation, job, actor, reason, permanent=False)
        return
    progress.write()
    kernel = built.cached or _kernel_row(built, actor.name)
    cached = built.cached is not None
    if workers.finish_job(job, kernel_digest=kernel.digest, cached=cached, build_ms=build_ms):
        kernels.note_use(kernel)
    if adaptation.state != AdaptationState.COMPILING:
        return
    transition(adaptation, AdaptationState.COMPILED, actor=actor, kernel=kernel)
    if _measured_limits_hold(adaptation, kernel):
        queue_dispatch(adaptation)


def _kernel_row(built: _Built, worker: str) -> Kernel:
    """Written only after the fence: a late attempt must not replace the row of a valid one."""
    assert built.bundle is not None
    assert built.report is not None
    return kernels.store_kernel(
        bundle=built.bundle,
        key=built.key,
        report=built.report,
        worker=worker,
        build_ms=built.build_ms,
    )


def _measured_limits_hold(adaptation: Adaptation, kernel: Kernel) -> bool:
    checks = check_measured(
        Certificate.from_wire(kernel.certificate),
        adaptation.safety_policy.safety_policy(),
        forecast=_forecast_of(kernel),
        peak_memory_mib=_nan_for_none(kernel.peak_memory_mib),
    )
    broken = [check for check in checks if check.blocks]
    _record_broken(
        adaptation,
        broken,
        severity=Severity.SERIOUS,
        action="The kernel was not sent to the run.",
    )
    if broken:
        reason = " ".join(check.text for check in broken)
        transition(adaptation, AdaptationState.DECLINED, actor=SYSTEM, reason=reason)
    return not broken


def _forecast_of(kernel: Kernel) -> CostForecast:
    return CostForecast(
        parameters=kernel.parameters,
        flops=0,
        memory_mib=_nan_for_none(kernel.forecast_memory_mib),
        latency_ms=_nan_for_none(kernel.forecast_latency_ms),
    )


def _nan_for_none(value: float | None) -> float:
    return math.nan if value is None else value


def _record_broken(
    adaptation: Adaptation, broken: list[Check], *, severity: Severity, action: str
) -> None:
    for check in broken:
        record_violation(
            run=adaptation.run,
            rule=check.rule,
            severity=severity,
            observed=check.observed,
            limit=check.limit,
            text=f"{adaptation.slug} in {adaptation.layer}: {check.text}",
            action=action,
            layer=adaptation.layer,
            adaptation_uid=adaptation.uid,
            step=adaptation.proposed_step,
        )


def queue_dispatch(adaptation: Adaptation) -> None:
    """The control worker dispatches: a compile worker holds no key that signs commands.

    A worker on the run's host has the kernel staged there, which saves the trainer the download.
    """
    host_queue = f"host.{adaptation.run.host}"
    if workers.queue_is_served(host_queue):
        enqueue(task=STAGE_TASK, queue=host_queue, args=[adaptation.uid])
    enqueue(task=DISPATCH_TASK, queue="control", args=[adaptation.uid])


@transaction.atomic
def _fail(
    job: CompileJob,
    actor: Actor,
    error: str,
    *,
    permanent: bool,
    builder_log: str = "",
    broken: list[Check] | None = None,
    progress: Progress | None = None,
) -> None:
    adaptation = _locked(job)
    if progress is not None:
        progress.write()
    _give_up_attempt(
        adaptation, job, actor, error, permanent=permanent, builder_log=builder_log, broken=broken
    )


def _give_up_attempt(
    adaptation: Adaptation,
    job: CompileJob,
    actor: Actor,
    error: str,
    *,
    permanent: bool,
    builder_log: str = "",
    broken: list[Check] | None = None,
) -> None:
    state = workers.fail_job(job, error=error, permanent=permanent, log=builder_log)
    if state is None or adaptation.state != AdaptationState.COMPILING:
        return
    if state == JobState.QUEUED:
        transition(adaptation, AdaptationState.COMPILE_QUEUED, actor=actor, reason=error)
        return
    _record_broken(
        adaptation,
        broken or [_no_kernel(adaptation, error, permanent=permanent)],
        severity=Severity.CAUTION,
        action=f"The job failed for good at attempt {job.attempt}; the run was not changed.",
    )
    transition(adaptation, AdaptationState.COMPILE_FAILED, actor=actor, reason=error)


def _no_kernel(adaptation: Adaptation, error: str, *, permanent: bool) -> Check:
    return Check(
        rule=ViolationRule.COMPATIBILITY if permanent else ViolationRule.DEADLINE,
        passed=False,
        hard=True,
        observed=error,
        limit="a certified kernel",
        text=f"The kernel for {adaptation.layer} could not be built: {error}",
    )


def take_lost_job_back(job: CompileJob) -> None:
    """The worker has not renewed its lease: queue another attempt, or fail the job."""
    _fail(job, SYSTEM, f"worker {job.lease_owner} was lost", permanent=False)
