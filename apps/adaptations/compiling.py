"""From approved to compiled: the work of the task on the queue ``compile.<capability>``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from django.conf import settings
from django.db import close_old_connections, transaction

from apps.accounts.actors import SYSTEM, Actor, ActorKind
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.kernels import services as kernels
from apps.kernels.cache import report_corrupt
from apps.kernels.cache_store import kernel_store
from apps.kernels.models import CompileJob, Kernel
from apps.notifications.services import enqueue
from apps.runs.services import lock_run
from apps.violations.services import record_violation
from esper.constraints import check_measured
from esper.contracts import (
    AdaptationState,
    Certificate,
    JobState,
    LayerInfo,
    Severity,
    ViolationRule,
)
from esper.exceptions import EsperError, KernelBuildError

if TYPE_CHECKING:
    from esper.contracts import KernelKey

log = logging.getLogger(__name__)

DISPATCH_TASK = "adaptations.dispatch"


def queue_compilation(adaptation: Adaptation, *, layer: LayerInfo, actor: Actor) -> Adaptation:
    """Approved: ask for a kernel. In the transaction of the approval."""
    job = kernels.queue_job(
        adaptation_uid=adaptation.uid,
        run_uid=adaptation.run.uid,
        blueprint_slug=adaptation.blueprint.slug,
        config=adaptation.config,
        layer=layer.to_wire(),
        capability=adaptation.run.capability,
    )
    return transition(adaptation, AdaptationState.COMPILE_QUEUED, actor=actor, job=job)


def compile_kernel(job_uid: str, *, worker: str) -> None:
    """Take the job if it is to be had, build or reuse the kernel, and send the result on."""
    job = CompileJob.objects.get(uid=job_uid)
    actor = Actor(ActorKind.WORKER, worker)
    if not _start(job, worker, actor):
        return
    started = time.perf_counter()
    try:
        with _renewed_lease(job):
            kernel, cached = _build_or_reuse(job, worker)
    except KernelBuildError as error:
        _fail(job, actor, str(error), permanent=error.permanent)
    except EsperError as error:
        _fail(job, actor, str(error), permanent=True)
    except Exception as error:
        log.exception("job %s", job.uid)
        _fail(job, actor, f"{type(error).__name__}: {error}", permanent=False)
    else:
        build_ms = (time.perf_counter() - started) * 1e3
        _finish(job, actor, kernel, cached=cached, build_ms=build_ms)


@transaction.atomic
def _start(job: CompileJob, worker: str, actor: Actor) -> bool:
    adaptation = _locked(job)
    if adaptation.state != AdaptationState.COMPILE_QUEUED:
        kernels.cancel_job(job)
        return False
    if not kernels.claim_job(job, worker=worker):
        return False
    transition(adaptation, AdaptationState.COMPILING, actor=actor)
    return True


def _locked(job: CompileJob) -> Adaptation:
    adaptations = Adaptation.objects.select_related("run", "safety_policy", "blueprint")
    run_id = adaptations.values_list("run_id", flat=True).get(uid=job.adaptation_uid)
    lock_run(run_id)
    return adaptations.get(uid=job.adaptation_uid)


@contextmanager
def _renewed_lease(job: CompileJob) -> Iterator[None]:
    """Renews the lease from a thread while the build goes on."""
    done = threading.Event()

    def renew() -> None:
        while not done.wait(settings.ESPER_COMPILE_HEARTBEAT_SECONDS):
            kernels.renew_lease(job)
            close_old_connections()

    thread = threading.Thread(target=renew, name=f"lease-{job.uid}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _build_or_reuse(job: CompileJob, worker: str) -> tuple[Kernel, bool]:
    from esper import blueprints
    from esper.compilation import kernel_key

    layer = LayerInfo.from_wire(job.layer)
    blueprint = blueprints.get(job.blueprint_slug)
    reason = blueprint.supports(layer)
    if reason:
        raise KernelBuildError(
            f"{blueprint.slug} does not fit {layer.name}: {reason}", permanent=True
        )
    key = kernel_key(layer, job.blueprint_slug, job.config)
    stored = _stored_kernel(key)
    if stored is not None:
        return stored, True
    return _build(job, key, layer, worker), False


def _stored_kernel(key: KernelKey) -> Kernel | None:
    """A kernel of this key whose files are there and whose signature still holds."""
    from esper.compilation import open_kernel

    row = Kernel.objects.filter(key_hash=key.hash).first()
    store = kernel_store()
    if row is None or not store.has(row.digest):
        return None
    try:
        open_kernel(store.get(row.digest), row.digest, settings.ESPER_KERNEL_PUBLIC_KEY)
    except EsperError as error:
        log.warning("kernel %s is built again: %s", row.digest, error)
        report_corrupt(row, str(error))
        return None
    return row


def _build(job: CompileJob, key: KernelKey, layer: LayerInfo, worker: str) -> Kernel:
    from esper.compilation import build_kernel, open_kernel

    started = time.perf_counter()
    private_key = Path(settings.ESPER_KERNEL_KEY_FILE).read_text().strip()
    bundle = build_kernel(layer, job.blueprint_slug, job.config, private_key=private_key)
    kernel_store().put(bundle)
    build_ms = (time.perf_counter() - started) * 1e3
    _, _, report = open_kernel(bundle.files, bundle.digest, settings.ESPER_KERNEL_PUBLIC_KEY)
    return kernels.store_kernel(
        bundle=bundle, key=key, report=report, worker=worker, build_ms=build_ms
    )


@transaction.atomic
def _finish(
    job: CompileJob, actor: Actor, kernel: Kernel, *, cached: bool, build_ms: float
) -> None:
    adaptation = _locked(job)
    if not kernels.finish_job(job, kernel=kernel, cached=cached, build_ms=build_ms):
        log.warning("job %s: this attempt came too late, its result is not taken", job.uid)
        return
    if adaptation.state != AdaptationState.COMPILING:
        return
    transition(adaptation, AdaptationState.COMPILED, actor=actor, kernel=kernel)
    if _measured_limits_hold(adaptation, kernel):
        queue_dispatch(adaptation)


def _measured_limits_hold(adaptation: Adaptation, kernel: Kernel) -> bool:
    certificate = Certificate.from_wire(kernel.certificate)
    policy = adaptation.safety_policy.safety_policy()
    broken = [check for check in check_measured(certificate, policy) if check.blocks]
    for check in broken:
        record_violation(
            run=adaptation.run,
            rule=check.rule,
            severity=Severity.SERIOUS,
            observed=check.observed,
            limit=check.limit,
            text=check.text,
            action="The kernel was measured before it reached the run; it was not sent.",
            layer=adaptation.layer,
            adaptation_uid=adaptation.uid,
            step=adaptation.proposed_step,
        )
    if broken:
        reason = " ".join(check.text for check in broken)
        transition(adaptation, AdaptationState.DECLINED, actor=SYSTEM, reason=reason)
    return not broken


def queue_dispatch(adaptation: Adaptation) -> None:
    """To the run's own host where a worker serves it, so that the kernel is staged there."""
    queue = f"host.{adaptation.run.host}"
    if not kernels.queue_is_served(queue):
        queue = "control"
    enqueue(task=DISPATCH_TASK, queue=queue, args=[adaptation.uid])


@transaction.atomic
def _fail(job: CompileJob, actor: Actor, error: str, *, permanent: bool) -> None:
    adaptation = _locked(job)
    state = kernels.fail_job(job, error=error, permanent=permanent)
    if state is None:
        return
    if adaptation.state != AdaptationState.COMPILING:
        return
    if state == JobState.QUEUED:
        transition(adaptation, AdaptationState.COMPILE_QUEUED, actor=actor, reason=error)
        return
    record_violation(
        run=adaptation.run,
        rule=ViolationRule.COMPATIBILITY if permanent else ViolationRule.DEADLINE,
        severity=Severity.CAUTION,
        observed=error,
        limit="a certified kernel",
        text=f"The kernel for {adaptation.layer} could not be made: {error}",
        action=f"Given up after attempt {job.attempt}; the run was not touched.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
        step=adaptation.proposed_step,
    )
    transition(adaptation, AdaptationState.COMPILE_FAILED, actor=actor, reason=error)


def take_lost_job_back(job: CompileJob) -> None:
    """The worker of this attempt is gone: another attempt, or the end."""
    _fail(job, SYSTEM, f"worker {job.lease_owner} was lost", permanent=False)
