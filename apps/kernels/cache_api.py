"""The cache over REST: its numbers, and what a person may do with it."""

from __future__ import annotations

from collections.abc import Callable

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.authentication import person, via
from apps.accounts.endpoint import Endpoint
from apps.kernels import cache
from apps.kernels.models import Kernel
from apps.kernels.selectors import cache_stats
from apps.kernels.serializers import CacheActInput, CacheStatsOutput, KernelOutput
from apps.rest.fields import parse
from apps.rest.idempotency import idempotent
from apps.rest.problems import not_found
from apps.rest.schema import documented
from apps.rest.throttling import ActThrottle


class Cache(Endpoint):
    @documented("read_kernel_cache", answer=CacheStatsOutput, summary="The cache in numbers")
    def get(self, request: Request) -> Response:
        return Response(CacheStatsOutput(cache_stats()).data)


class CacheScrub(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("scrub_kernel_cache", body=CacheActInput, answer=None, status=202, act=True)
    @idempotent
    def post(self, request: Request) -> Response:
        given = parse(CacheActInput, request.data)
        cache.scrub_now(user=person(request), via=via(request), reason=given["reason"])
        return Response(status=202)


def _act(name: str, service: Callable[..., Kernel]) -> type[Endpoint]:
    return act_endpoint(
        name,
        service,
        subject="kernel",
        find=_kernel,
        answer=lambda _, kernel: Response(KernelOutput(kernel).data),
        output=KernelOutput,
        body=CacheActInput,
    )


def _kernel(_: Request, digest: str) -> Kernel:
    kernel = Kernel.objects.filter(digest=digest).first()
    if kernel is None:
        raise not_found("kernel")
    return kernel


PinKernel = _act("pin_kernel", cache.pin)
UnpinKernel = _act("unpin_kernel", cache.unpin)
EvictKernel = _act("evict_kernel", cache.evict)
