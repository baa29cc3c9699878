"""The cache over REST: its numbers, and what a person may do with it."""

from __future__ import annotations

from typing import ClassVar

from rest_framework.request import Request
from rest_framework.response import Response

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

ACTS = {"pin": cache.pin, "unpin": cache.unpin, "evict": cache.evict}


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


class KernelAct(Endpoint):
    throttle_classes = (ActThrottle,)
    act: ClassVar[str]

    def carry_out(self, request: Request, digest: str) -> Response:
        kernel = Kernel.objects.filter(digest=digest).first()
        if kernel is None:
            raise not_found("kernel")
        given = parse(CacheActInput, request.data)
        done = ACTS[self.act](
            kernel=kernel, user=person(request), via=via(request), reason=given["reason"]
        )
        return Response(KernelOutput(done).data)


class PinKernel(KernelAct):
    act = "pin"

    @documented("pin_kernel", body=CacheActInput, answer=KernelOutput, act=True)
    @idempotent
    def post(self, request: Request, digest: str) -> Response:
        return self.carry_out(request, digest)


class UnpinKernel(KernelAct):
    act = "unpin"

    @documented("unpin_kernel", body=CacheActInput, answer=KernelOutput, act=True)
    @idempotent
    def post(self, request: Request, digest: str) -> Response:
        return self.carry_out(request, digest)


class EvictKernel(KernelAct):
    act = "evict"

    @documented("evict_kernel", body=CacheActInput, answer=KernelOutput, act=True)
    @idempotent
    def post(self, request: Request, digest: str) -> Response:
        return self.carry_out(request, digest)
