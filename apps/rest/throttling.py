"""How many requests one caller may send; above the limit the answer is 429 with ``Retry-After``."""

from __future__ import annotations

from rest_framework.request import Request
from rest_framework.throttling import SimpleRateThrottle
from rest_framework.views import APIView


class _CallerThrottle(SimpleRateThrottle):
    def get_cache_key(self, request: Request, view: APIView) -> str | None:
        if request.method in {"GET", "HEAD", "OPTIONS"}:
            return None
        return self.key_of_caller(request)

    def key_of_caller(self, request: Request) -> str:
        caller = getattr(request.auth, "uid", request.user.pk)  # a browser's session has no token
        return f"throttle:{self.scope}:{caller}"


class ActThrottle(_CallerThrottle):
    """People's acts."""

    scope = "acts"
    rate = "300/min"


class TelemetryThrottle(_CallerThrottle):
    """Batches of one run. The SDK sends about two a second."""

    scope = "telemetry"
    rate = "3000/min"


class AuditThrottle(_CallerThrottle):
    """Whole passes over the audit log, which are reads."""

    scope = "audit"
    rate = "20/min"

    def get_cache_key(self, request: Request, view: APIView) -> str | None:
        return self.key_of_caller(request)


class TokenThrottle(_CallerThrottle):
    scope = "tokens"
    rate = "120/min"
