"""Tier 1: compile a graft that is in a model in the background, and offer it to the trainer.

grafted ─► queued ─► building ─► offered ─► swapped_in
                         │           └────► kept_eager, with what was measured
                         └────────────────► kept_eager (slower on the worker), unavailable, failed

Nothing waits for it: the eager graft stays in use in every case. A process of its own builds the
kernel at the lowest priority. The compile worker starts that process and does not wait for it; the
row in the database holds its progress.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from django.conf import settings
from django.db import transaction

from apps.adaptations.history import freeze_asks
from apps.adaptations.models import Adaptation
from apps.kernels.models import Kernel, SpeedUp
from apps.kernels.services import kernel_store, store_kernel
from apps.notifications.services import enqueue, publish, run_topic
from apps.policies.selectors import next_freeze
from apps.rest.clock import now as database_now
from apps.runs.models import Command
from apps.runs.services import issue_command, lock_run
from esper.contracts import (
    ADAPTATION_ENDED,
    AdaptationState,
    CommandAck,
    CommandKind,
    CommandState,
    KernelKey,
    KernelReport,
    LayerInfo,
    SpeedUpState,
)
from esper.exceptions import CompilerMissingError, EsperError

log = logging.getLogger(__name__)

SPEED_UP_TASK = "adaptations.speed_up"
OFFER_TASK = "adaptations.offer_speed_up"
OFFER_SECONDS = 600
GIVE_UP_AFTER = timedelta(minutes=15)
WORTH_OFFERING = 1.0  # slower than that on the worker's device: it is not offered


def request_speed_up(adaptation: Adaptation) -> SpeedUp | None:
    """Ask for the compiled kernel of a graft, if its trainer accepts one. In a transaction."""
    run = adaptation.run
    if not settings.ESPER_COMPILED_KERNELS or run.versions.get("machine_code") != "taken":
        return None
    if adaptation.job is None:
        return None
    row, made = SpeedUp.objects.get_or_create(
        adaptation_uid=adaptation.uid,
        defaults={
            "run_uid": run.uid,
            "layer": adaptation.layer,
            "blueprint_slug": adaptation.grafted_blueprint.slug,
            "capability": adaptation.job.capability,
        },
    )
    if made:
        enqueue(task=SPEED_UP_TASK, queue=f"compile.{row.capability}", args=[row.pk])
    return row


def start_builder(pk: int) -> None:
    """Start the builder process and return, so that the worker can take the next job."""
    if not SpeedUp.objects.filter(pk=pk, state=SpeedUpState.QUEUED).exists():
        return
    subprocess.Popen(
        [sys.executable, "-m", "django", "build_compiled_kernels"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def build_next(*, worker: str) -> bool:
    """Build the oldest queued one; False when there is none. For the builder's process only."""
    give_up_lost()
    row = SpeedUp.objects.filter(
        state=SpeedUpState.QUEUED, capability__in=settings.ESPER_WORKER_CAPABILITIES
    ).first()
    if row is None:
        return False
    claimed = SpeedUp.objects.filter(pk=row.pk, state=SpeedUpState.QUEUED).update(
        state=SpeedUpState.BUILDING, started_at=database_now()
    )
    if claimed:
        _build(row, worker)
    return True


def give_up_lost() -> int:
    """Fail rows whose builder or trainer has not reported in time; return how many."""
    waiting = (SpeedUpState.QUEUED, SpeedUpState.BUILDING, SpeedUpState.OFFERED)
    return SpeedUp.objects.filter(
        state__in=waiting, asked_at__lt=database_now() - GIVE_UP_AFTER
    ).update(
        state=SpeedUpState.FAILED, text="neither builder nor trainer reported a result in time"
    )


def _build(row: SpeedUp, worker: str) -> None:
    adaptation = Adaptation.objects.select_related("run", "job", "blueprint").get(
        uid=row.adaptation_uid
    )
    try:
        kernel, report = _build_or_reuse(adaptation, worker)
    except CompilerMissingError as error:
        _end(row, SpeedUpState.UNAVAILABLE, str(error))
    except EsperError as error:
        _end(row, SpeedUpState.FAILED, str(error))
    except Exception as error:
        log.exception("compiled kernel of %s", adaptation.uid)
        _end(row, SpeedUpState.FAILED, f"{type(error).__name__}: {error}")
    else:
        measured = report.speedup if math.isfinite(report.speedup) else None
        with transaction.atomic():
            SpeedUp.objects.filter(pk=row.pk).update(kernel=kernel, worker_speedup=measured)
            enqueue(task=OFFER_TASK, queue="control", args=[row.pk])


def _build_or_reuse(adaptation: Adaptation, worker: str) -> tuple[Kernel, KernelReport]:
    from esper.compilation import build_compiled, compiled_key, open_compiled

    assert adaptation.job is not None
    layer = LayerInfo.from_wire(adaptation.job.layer)
    slug, config = adaptation.grafted_blueprint.slug, adaptation.config
    key = compiled_key(layer, slug, config)
    stored = _stored(key)
    if stored is not None:
        return stored
    started = time.perf_counter()
    private_key = Path(settings.ESPER_KERNEL_KEY_FILE).read_text().strip()
    bundle = build_compiled(layer, slug, config, private_key=private_key)
    kernel_store().put(bundle)
    trusted = settings.ESPER_KERNEL_PUBLIC_KEY
    report = open_compiled(bundle.files, bundle.digest, trusted)[2]
    build_ms = (time.perf_counter() - started) * 1e3
    kernel = store_kernel(bundle=bundle, key=key, report=report, worker=worker, build_ms=build_ms)
    return kernel, report


def _stored(key: KernelKey) -> tuple[Kernel, KernelReport] | None:
    from esper.compilation import open_compiled

    row = Kernel.objects.filter(key_hash=key.hash, evicted_at=None).first()
    if row is None:
        return None
    try:
        files = kernel_store().get(row.digest)
        return row, open_compiled(files, row.digest, settings.ESPER_KERNEL_PUBLIC_KEY)[2]
    except EsperError as error:
        log.warning("compiled kernel %s is built again: %s", row.digest, error)
        return None


@transaction.atomic
def offer(pk: int) -> None:
    """Offer the trainer a kernel that was built. In the control worker, which signs commands."""
    row = (
        SpeedUp.objects.filter(pk=pk, state=SpeedUpState.BUILDING).select_related("kernel").first()
    )
    if row is None or row.kernel is None:
        return  # offered already, or given up
    adaptation = Adaptation.objects.get(uid=row.adaptation_uid)
    run = lock_run(adaptation.run_id)
    adaptation.refresh_from_db()
    speedup = math.nan if row.worker_speedup is None else row.worker_speedup
    if not speedup >= WORTH_OFFERING:
        _end(row, SpeedUpState.KEPT_EAGER, f"compiled {speedup:.2f}× on the worker, kept eager")
        return
    in_model = adaptation.state in (AdaptationState.PROBATION, AdaptationState.KEPT)
    if not in_model or adaptation.state in ADAPTATION_ENDED - {AdaptationState.KEPT}:
        _end(row, SpeedUpState.KEPT_EAGER, "the graft was taken out before the kernel was ready")
        return
    begins = next_freeze(run.project_id)  # before the next line: one may begin in between
    if frozen := freeze_asks(run):
        _end(row, SpeedUpState.KEPT_EAGER, frozen[0])
        return
    issue_command(
        run=run,
        kind=CommandKind.SPEED_UP,
        adaptation_uid=adaptation.uid,
        layer=adaptation.layer,
        kernel_digest=row.kernel.digest,
        ttl_seconds=OFFER_SECONDS,
        not_after=begins,
    )
    _move(row, SpeedUpState.OFFERED, f"compiled {speedup:.2f}× on the worker, offered")


def note_answer(command: Command, ack: CommandAck) -> None:
    """Record what the trainer measured on its device. In the transaction of the answer."""
    row = SpeedUp.objects.filter(adaptation_uid=command.adaptation_uid).first()
    if row is None or ack.state is CommandState.ACCEPTED:
        return
    speedup = ack.speedup if ack.speedup is not None and math.isfinite(ack.speedup) else None
    SpeedUp.objects.filter(pk=row.pk).update(speedup=speedup)
    if ack.state is CommandState.APPLIED:
        _end(row, SpeedUpState.SWAPPED_IN, ack.reason)
    elif ack.code == "unavailable":
        _end(row, SpeedUpState.UNAVAILABLE, ack.reason)
    elif ack.state is CommandState.REFUSED:
        _end(row, SpeedUpState.KEPT_EAGER, ack.reason or ack.code)
    else:
        _end(row, SpeedUpState.FAILED, ack.reason or ack.code)


def _end(row: SpeedUp, state: SpeedUpState, text: str) -> None:
    SpeedUp.objects.filter(pk=row.pk).update(ended_at=database_now())
    _move(row, state, text)


def _move(row: SpeedUp, state: SpeedUpState, text: str) -> None:
    SpeedUp.objects.filter(pk=row.pk).update(state=state, text=text[:2000])
    with transaction.atomic():
        publish(
            topic=run_topic(row.run_uid),
            type="kernel.speed_up",
            data={"adaptation": row.adaptation_uid, "state": str(state), "text": text[:300]},
        )
