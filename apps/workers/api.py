from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from django.http import HttpResponseBase
from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.endpoint import Endpoint
from apps.rest.etag import cacheable_response
from apps.rest.fields import message
from apps.rest.filters import Lookup, apply_filters, between, flag, moment, one_of, searching, text
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import documented, listing, page_of
from apps.runs.selectors import of_run_uid
from apps.workers.models import CompileJob, Worker
from apps.workers.selectors import current_jobs
from apps.workers.serializers import JobOutput, WorkerOutput
from apps.workers.services import Presence, heartbeat, set_worker_mode
from esper.contracts import JobState, TokenScope, WorkerKind, WorkerMode, WorkerState, protocol

JOB_FILTERS: dict[str, Lookup] = {
    "state": ("state", one_of(JobState)),
    "run": (of_run_uid, text),
    "adaptation": ("adaptation_uid", text),
    "cached": ("cached", flag),
}
WORKER_FILTERS: dict[str, Lookup] = {
    "kind": ("kind", one_of(WorkerKind)),
    "state": ("state", one_of(WorkerState)),
    "mode": ("mode", one_of(WorkerMode)),
    "host": ("host", text),
    "q": searching("name", "host"),
    **between(moment, "heartbeat_at"),
}
ORDER = ("heartbeat_at", "name")


class Jobs(Endpoint):
    parameters = PARAMETERS | frozenset(JOB_FILTERS)

    @documented(
        "list_jobs",
        answer=page_of(JobOutput),
        parameters=listing(JOB_FILTERS),
    )
    def get(self, request: Request) -> HttpResponseBase:
        jobs = apply_filters(
            request,
            CompileJob.objects.prefetch_related("steps"),
            JOB_FILTERS,
        )
        return page_response(request, jobs, lambda rows: JobOutput(rows, many=True).data)


class Workers(Endpoint):
    parameters = PARAMETERS | frozenset(WORKER_FILTERS)

    @documented(
        "list_workers",
        answer=page_of(WorkerOutput),
        parameters=listing(WORKER_FILTERS, ORDER),
        summary="Workers and Tamiyo, as they last reported",
    )
    def get(self, request: Request) -> HttpResponseBase:
        workers = apply_filters(request, Worker.objects.all(), WORKER_FILTERS)
        return page_response(request, workers, worker_rows, order=ORDER)


def worker_rows(workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """Workers with the job that each builds now."""
    context = {"jobs": current_jobs(workers)}
    return list(WorkerOutput(workers, many=True, context=context).data)


def _act(name: str, mode: WorkerMode) -> type[Endpoint]:
    return act_endpoint(
        name,
        partial(set_worker_mode, mode=mode),
        subject="worker",
        find=_worker,
        answer=lambda _, worker: Response(worker_rows([worker])[0]),
        output=WorkerOutput,
    )


def _worker(_: Request, name: str) -> Worker:
    worker = Worker.objects.filter(name=name).first()
    if worker is None:
        raise not_found("worker")
    return worker


class WorkerDetail(Endpoint):
    @documented("read_worker", answer=WorkerOutput)
    def get(self, request: Request, name: str) -> Response:
        return cacheable_response(request, worker_rows([_worker(request, name)])[0])


class JobDetail(Endpoint):
    @documented("read_job", answer=JobOutput)
    def get(self, request: Request, uid: str) -> Response:
        job = CompileJob.objects.prefetch_related("steps").filter(uid=uid).first()
        if job is None:
            raise not_found("job")
        return cacheable_response(request, JobOutput(job).data)


DrainWorker = _act("drain_worker", WorkerMode.DRAINING)
QuarantineWorker = _act("quarantine_worker", WorkerMode.QUARANTINED)
ReleaseWorker = _act("release_worker", WorkerMode.ACTIVE)


class TamiyoHeartbeat(Endpoint):
    writers: ClassVar = frozenset({TokenScope.DECIDE})

    @documented("report_tamiyo_heartbeat", body=protocol.Heartbeat, answer=None, status=204)
    def post(self, request: Request) -> Response:
        given = message(request, protocol.Heartbeat)
        heartbeat(_presence(given.instance, given.status))
        return Response(status=204)


def _presence(instance: str, status: dict[str, Any]) -> Presence:
    """Tamiyo is listed with the workers: it has no queue, only a heartbeat."""
    name = f"tamiyo@{instance}"
    known = Worker.objects.filter(name=name).first()
    versions = {key: value for key, value in status.items() if isinstance(value, str)}
    return Presence(
        name=name,
        host=instance,
        kind=WorkerKind.TAMIYO,
        versions=versions,
        started_at=known.started_at if known else timezone.now(),
    )
