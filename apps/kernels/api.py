from __future__ import annotations

from typing import ClassVar

from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.types import OpenApiTypes
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.endpoint import READERS, Endpoint, run_of_token
from apps.kernels.cache_store import kernel_store
from apps.kernels.models import Kernel
from apps.kernels.selectors import run_may_fetch
from apps.kernels.serializers import KernelOutput
from apps.rest.etag import cacheable_response
from apps.rest.filters import Lookup, apply_filters, between, moment, searching, text, whole_number
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import documented, listing, page_of
from esper.contracts import TokenScope
from esper.contracts.kernels import COMPILED_FILES
from esper.exceptions import KernelError

KERNEL_FILTERS: dict[str, Lookup] = {
    "blueprint": ("blueprint_slug", text),
    "capability": ("capability", text),
    "q": searching("blueprint_slug", "digest", "layer_kind", "device_name"),
    **between(whole_number, "uses", "size_bytes"),
    **between(moment, "built_at"),
}
ORDER = ("built_at", "size_bytes", "uses")


class Kernels(Endpoint):
    parameters = PARAMETERS | frozenset(KERNEL_FILTERS)

    @documented(
        "list_kernels",
        answer=page_of(KernelOutput),
        parameters=listing(KERNEL_FILTERS, ORDER),
    )
    def get(self, request: Request) -> HttpResponseBase:
        kernels = apply_filters(request, Kernel.objects.all(), KERNEL_FILTERS)
        return page_response(
            request, kernels, lambda rows: KernelOutput(rows, many=True).data, order=ORDER
        )


class KernelDetail(Endpoint):
    @documented("read_kernel", answer=KernelOutput)
    def get(self, request: Request, digest: str) -> Response:
        kernel = Kernel.objects.filter(digest=digest).first()
        if kernel is None:
            raise not_found("kernel")
        return cacheable_response(request, KernelOutput(kernel).data)


class KernelFile(Endpoint):
    readers: ClassVar = READERS | {TokenScope.RUN_WRITE}

    @documented(
        "read_kernel_file",
        answer=OpenApiTypes.BINARY,
        media_type="application/octet-stream",
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
