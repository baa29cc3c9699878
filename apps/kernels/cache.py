"""The kernel cache: pins, eviction, scrubbing, and kernels that are built ahead.

Evicting removes a kernel's files and keeps its row: adaptations refer to it, and the next request
builds the same kernel again. Every change by a person or by a timer has an audit row.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Sum
from django.utils import timezone

from apps.accounts.actors import SYSTEM, Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.audit.services import record
from apps.kernels.cache_store import count, kernel_store
from apps.kernels.models import Kernel, WarmUp
from apps.kernels.rows import store_kernel
from apps.kernels.selectors import MIB, Counter, evictable
from apps.notifications.services import SYSTEM_TOPIC, enqueue, publish
from apps.rest.problems import Problem
from apps.violations.services import record_violation
from apps.workers.models import CompileJob
from apps.workers.services import builders
from esper.compilation import BuildOrder, open_kernel
from esper.compilation.bundle import pack
from esper.compilation.verify import open_any
from esper.contracts import JobState, LayerInfo, Severity, ViolationRule, codec
from esper.exceptions import EsperError, KernelError, StoreUnavailableError

log = logging.getLogger(__name__)

WARM_TASK = "kernels.warm"
SCRUB_BATCH = 200
GIVE_UP_WARM_UP_AFTER = timedelta(minutes=5)
# What the heuristic policy proposes first: one kernel of each for the largest layers.
LIKELY_BLUEPRINTS = ("proj_lora_64", "mlp_gelu_2048", "proj_ia3")

# -- by a person ----------------------------------------------------------------------------------


@transaction.atomic
def pin(*, kernel: Kernel, user: User, via: str, reason: str = "") -> Kernel:
    """Never evict this kernel. Raises ``Problem`` when not allowed, or when it is evicted."""
    _require(user)
    if not Kernel.objects.filter(pk=kernel.pk, evicted_at=None).update(pinned_by=user.username):
        raise Problem(409, "kernel-evicted", "Its files are not in the cache any more.")
    return _noted(kernel, Actor.person(user, via=via), "kernel.pinned", reason)


@transaction.atomic
def unpin(*, kernel: Kernel, user: User, via: str, reason: str = "") -> Kernel:
    """Allow eviction again. Raises ``Problem`` when not allowed."""
    _require(user)
    Kernel.objects.filter(pk=kernel.pk).update(pinned_by="")
    return _noted(kernel, Actor.person(user, via=via), "kernel.unpinned", reason)


@transaction.atomic
def evict(*, kernel: Kernel, user: User, via: str, reason: str = "") -> Kernel:
    """Remove its files. Raises ``Problem`` when not allowed, or when it is pinned or in use."""
    _require(user)
    if not evictable().filter(pk=kernel.pk).exists():
        why = "It is pinned, in use or evicted: unpin it, or wait for its adaptation to end."
        raise Problem(409, "kernel-in-use", why)
    return _evict(kernel, Actor.person(user, via=via), reason)


def scrub_now(*, user: User, via: str, reason: str = "") -> None:
    """Queue a check of every kernel. Raises ``Problem`` when not allowed."""
    _require(user)
    with transaction.atomic():
        Kernel.objects.update(scrubbed_at=None)
        record(
            actor=Actor.person(user, via=via),
            act="cache.scrub_requested",
            object_kind="cache",
            object_uid="kernels",
            reason=reason,
        )
        enqueue(task="kernels.scrub", queue="control", args=[])


# -- by a timer ---------------------------------------------------------------------------------


def limit_cache() -> int:
    """Evict the least recently used kernels until the rest fits; return how many."""
    limit = settings.ESPER_KERNEL_CACHE_MIB * MIB
    total = Kernel.objects.filter(evicted_at=None).aggregate(sum=Sum("size_bytes"))["sum"] or 0
    evicted = 0
    for kernel in evictable():
        if total <= limit:
            break
        with transaction.atomic():
            if not evictable().filter(pk=kernel.pk).exists():
                continue  # in use or pinned since the query
            _evict(kernel, SYSTEM, f"the cache holds {total} bytes, {limit} are allowed")
        total -= kernel.size_bytes
        evicted += 1
    return evicted


def scrub() -> int:
    """Check digest and signature of the kernels that were checked longest ago.

    Returns how many were corrupt.

    Raises:
        StoreUnavailableError: the store cannot be reached; no kernel is called corrupt then.
    """
    corrupt = 0
    waiting = Kernel.objects.filter(evicted_at=None)
    for kernel in waiting.order_by("scrubbed_at", "id")[:SCRUB_BATCH]:
        try:
            open_any(
                kernel_store().get(kernel.digest), kernel.digest, settings.ESPER_KERNEL_PUBLIC_KEY
            )
        except StoreUnavailableError:
            raise
        except KernelError as error:
            report_corrupt(kernel, str(error))
            corrupt += 1
        Kernel.objects.filter(pk=kernel.pk).update(scrubbed_at=timezone.now())
        count(Counter.SCRUBBED)
    return corrupt


@transaction.atomic
def report_corrupt(kernel: Kernel, problem: str) -> None:
    """Set its files aside, write a violation, and queue the same kernel for building."""
    kernel_store().set_aside(kernel.digest)
    if not Kernel.objects.filter(pk=kernel.pk, evicted_at=None).update(
        evicted_at=timezone.now(), pinned_by=""
    ):
        return  # reported before
    count(Counter.CORRUPT)
    record_violation(
        run=None,
        rule=ViolationRule.SIGNATURE,
        severity=Severity.SERIOUS,
        observed=problem,
        limit="content as it was signed",
        text=f"Kernel {kernel.digest[:12]} ({kernel.blueprint_slug}) in the cache is corrupt.",
        action="Its files were set aside, and it is built again.",
    )
    _noted(kernel, SYSTEM, "kernel.corrupt", problem)
    job = CompileJob.objects.filter(kernel_digest=kernel.digest).order_by("-id").first()
    if job is not None:
        _want(job.run_uid, job.blueprint_slug, job.config, job.layer, job.capability)


# -- ahead of time --------------------------------------------------------------------------------


def plan_warm_up(*, run_uid: str, layers: Iterable[dict[str, Any]], capability: str) -> int:
    """Queue a few kernels that a newly registered run will likely need; return how many.

    The largest layers come first, because most grafts are proposed there.
    """
    graftable = sorted(
        (layer for layer in layers if layer.get("graftable")),
        key=lambda layer: -int(layer.get("parameters") or 0),
    )
    wanted = [(slug, layer) for layer in graftable for slug in LIKELY_BLUEPRINTS]
    noted = 0
    for slug, layer in wanted:
        if noted >= settings.ESPER_WARM_UP_KERNELS:
            break
        noted += _want(run_uid, slug, {}, layer, capability)
    return noted


def warm_next() -> int:
    """Notify the workers of one kernel for each idle capability; return how many."""
    late = timezone.now() - GIVE_UP_WARM_UP_AFTER
    WarmUp.objects.filter(state=JobState.RUNNING, started_at__lt=late).update(
        state=JobState.FAILED, error="the worker was lost"
    )
    notified = 0
    waiting = WarmUp.objects.filter(state=JobState.QUEUED).order_by("id")
    for capability in set(waiting.values_list("capability", flat=True)):
        if _busy(capability):
            continue
        one = waiting.filter(capability=capability).first()
        if one is not None:
            with transaction.atomic():
                enqueue(task=WARM_TASK, queue=f"compile.{capability}", args=[one.pk])
            notified += 1
    return notified


def warm(pk: int, *, worker: str) -> None:
    """Build one kernel ahead, unless a job waits for the worker."""
    one = WarmUp.objects.filter(pk=pk, state=JobState.QUEUED).first()
    if one is None or _busy(one.capability):
        return
    claimed = WarmUp.objects.filter(pk=pk, state=JobState.QUEUED).update(
        state=JobState.RUNNING, started_at=timezone.now()
    )
    if not claimed:
        return
    try:
        _build(one, worker)
    except EsperError as error:  # it cannot be built; no run has asked for it
        WarmUp.objects.filter(pk=pk).update(state=JobState.FAILED, error=str(error)[:2000])
        return
    WarmUp.objects.filter(pk=pk).update(state=JobState.DONE)


def _build(one: WarmUp, worker: str) -> None:
    layer = LayerInfo.from_wire(one.layer)
    order = BuildOrder(layer, one.blueprint_slug, one.config, one.capability)
    builder = builders().ready()
    key, _ = builder.specify(order)
    known = Kernel.objects.filter(key_hash=key.hash, evicted_at=None).first()
    if known is not None and kernel_store().has(known.digest):
        return
    started = time.perf_counter()
    draft = builder.draft(order, on_step=lambda _step, _forecast: None, stopped=lambda: False)
    bundle = pack(draft, private_key=Path(settings.ESPER_KERNEL_KEY_FILE).read_text().strip())
    kernel_store().put(bundle)
    _, _, report = open_kernel(bundle.files, bundle.digest, settings.ESPER_KERNEL_PUBLIC_KEY)
    build_ms = (time.perf_counter() - started) * 1e3
    store_kernel(bundle=bundle, key=key, report=report, worker=worker, build_ms=build_ms)
    count(Counter.WARMED)


def _busy(capability: str) -> bool:
    open_states = [JobState.QUEUED, JobState.RUNNING]
    if CompileJob.objects.filter(capability=capability, state__in=open_states).exists():
        return True
    return WarmUp.objects.filter(capability=capability, state=JobState.RUNNING).exists()


def _want(
    run_uid: str, slug: str, config: dict[str, Any], layer: dict[str, Any], capability: str
) -> bool:
    """Queue a kernel; False when the same one is queued. One that has ended is queued again."""
    shape = {**layer, "name": "", "feeds": []}
    content = codec.encode([shape, slug, config, capability])
    one, made = WarmUp.objects.get_or_create(
        key=hashlib.sha256(content).hexdigest(),
        defaults={
            "run_uid": run_uid,
            "blueprint_slug": slug,
            "config": config,
            "layer": layer,
            "capability": capability,
        },
    )
    if made:
        return True
    again = WarmUp.objects.filter(pk=one.pk, state__in=[JobState.DONE, JobState.FAILED])
    return bool(again.update(state=JobState.QUEUED, error=""))


def _evict(kernel: Kernel, actor: Actor, reason: str) -> Kernel:
    Kernel.objects.filter(pk=kernel.pk).update(evicted_at=timezone.now())
    count(Counter.EVICTIONS)
    # After the commit, because a rollback does not restore removed files.
    transaction.on_commit(lambda: _remove_files(kernel.digest))
    return _noted(kernel, actor, "kernel.evicted", reason)


def _remove_files(digest: str) -> None:
    try:
        kernel_store().remove(digest)
    except (KernelError, OSError) as error:
        log.warning("the files of evicted kernel %s are still there: %s", digest, error)


def _noted(kernel: Kernel, actor: Actor, act: str, reason: str) -> Kernel:
    record(
        actor=actor,
        act=act,
        object_kind="kernel",
        object_uid=kernel.digest,
        reason=reason,
        data={"blueprint": kernel.blueprint_slug, "size_bytes": kernel.size_bytes},
    )
    publish(topic=SYSTEM_TOPIC, type=act, data={"kernel": kernel.digest})
    kernel.refresh_from_db()
    return kernel


def _require(user: User) -> None:
    permission = may(user, Act.MANAGE_CACHE)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)
