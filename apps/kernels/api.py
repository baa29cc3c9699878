from __future__ import annotations

from typing import Any, ClassVar

from django.http import HttpResponse
from django.utils import timezone
from drf_spectacular.types import OpenApiTypes
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.problems import not_found
from apps.api.endpoint import READERS, Endpoint, run_of_token
from apps.api.fields import parse
from apps.api.filters import apply_filters, flag, one_of, text
from apps.api.pagination import PARAMETERS, page_response
from apps.api.schema import CURSOR, LIMIT, documented, page_of, query
from apps.kernels.cache_store import kernel_store
from apps.kernels.models import CompileJob, Kernel, Worker
from apps.kernels.selectors import run_may_fetch
from apps.kernels.serializers import HeartbeatInput, JobOutput, KernelOutput, WorkerOutput
from apps.kernels.services import Presence, heartbeat
from esper.contracts import JobState, TokenScope, WorkerState
from esper.contracts.kernels import COMPILED_FILES
from esper.exceptions import KernelError

TAMIYO_CAPABILITY = "tamiyo"
KERNEL_FILTERS = {"blueprint": ("blueprint_slug", text), "capability": ("capability", text)}
JOB_FILTERS = {
    "state": ("state", one_of(JobState)),
    "run": ("run_uid", text),
    "adaptation": ("adaptation_uid", text),
    "cached": ("cached", flag),
}
WORKER_FILTERS = {"state": ("state", one_of(WorkerState)), "host": ("host", text)}


class Kernels(Endpoint):
    parameters = PARAMETERS | frozenset(KERNEL_FILTERS)

    @documented(
        "list_kernels",
        answer=page_of(KernelOutput),
        parameters=[*(query(name) for name in KERNEL_FILTERS), CURSOR, LIMIT],
    )
    def get(self, request: Request) -> Response:
        kernels = apply_filters(request, Kernel.objects.all(), KERNEL_FILTERS)
        return page_response(request, kernels, lambda rows: KernelOutput(rows, many=True).data)


class KernelFile(Endpoint):
    readers: ClassVar = READERS | {TokenScope.RUN_WRITE}

    @documented(
        "read_kernel_file",
        answer=OpenApiTypes.BINARY,
        summary=f"One of {', '.join(COMPILED_FILES)}",
    )
    def get(self, request: Request, digest: str, file: str) -> HttpResponse:
        run_uid = run_of_token(request)
        if file not in COMPILED_FILES or (run_uid and not run_may_fetch(run_uid, digest)):
            raise not_found("kernel file")
        try:
            content = kernel_store().get(digest)[file]
        except (KernelError, KeyError) as error:
            raise not_found("kernel file") from error
        return HttpResponse(
            content,
            content_type="application/octet-stream",
            # Its name is its content: whoever has it never needs to ask again.
            headers={"Cache-Control": "private, max-age=31536000, immutable"},
        )


class Jobs(Endpoint):
    parameters = PARAMETERS | frozenset(JOB_FILTERS)

    @documented(
        "list_jobs",
        answer=page_of(JobOutput),
        parameters=[*(query(name) for name in JOB_FILTERS), CURSOR, LIMIT],
    )
    def get(self, request: Request) -> Response:
        jobs = apply_filters(request, CompileJob.objects.select_related("kernel"), JOB_FILTERS)
        return page_response(request, jobs, lambda rows: JobOutput(rows, many=True).data)


class Workers(Endpoint):
    parameters = PARAMETERS | frozenset(WORKER_FILTERS)

    @documented(
        "list_workers",
        answer=page_of(WorkerOutput),
        parameters=[*(query(name) for name in WORKER_FILTERS), CURSOR, LIMIT],
        summary=f"Workers, and Tamiyo (capability {TAMIYO_CAPABILITY!r}), as they last reported",
    )
    def get(self, request: Request) -> Response:
        workers = apply_filters(request, Worker.objects.all(), WORKER_FILTERS)
        return page_response(request, workers, lambda rows: WorkerOutput(rows, many=True).data)


class TamiyoHeartbeat(Endpoint):
    writers: ClassVar = frozenset({TokenScope.DECIDE})

    @documented("report_tamiyo_heartbeat", body=HeartbeatInput, answer=None, status=204)
    def post(self, request: Request) -> Response:
        given = parse(HeartbeatInput, request.data)
        heartbeat(_presence(given["instance"], given["status"]))
        return Response(status=204)


def _presence(instance: str, status: dict[str, Any]) -> Presence:
    """Tamiyo among the workers: it has no queue, and its heartbeat says that it lives."""
    name = f"tamiyo@{instance}"
    known = Worker.objects.filter(name=name).first()
    versions = {key: value for key, value in status.items() if isinstance(value, str)}
    return Presence(
        name=name,
        host=instance,
        capability=TAMIYO_CAPABILITY,
        queues=[],
        devices=[],
        versions=versions,
        started_at=known.started_at if known else timezone.now(),
    )
