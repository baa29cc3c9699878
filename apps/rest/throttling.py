"""How many requests one caller may send; above the limit the answer is 429 with ``Retry-After``."""

from __future__ import annotations

from rest_framework.request import Request
from rest_framework.throttling import SimpleRateThrottle
from rest_framework.views import APIView


class _CallerThrottle(SimpleRateThrottle):
    num_requests: int  # set by rest_framework from ``rate``
    duration: int

    def get_cache_key(self, request: Request, view: APIView) -> str | None:
        if request.method in {"GET", "HEAD", "OPTIONS"}:
            return None
        return self.key_of_caller(request)

    def allow_request(self, request: Request, view: APIView) -> bool:
        """Also notes what is left for the answer's headers (the draft of the IETF names them)."""
        allowed: bool = super().allow_request(request, view)
        if getattr(self, "key", None) is not None:
            left = max(0, self.num_requests - len(self.history))
            # set on the request: the view reads it when it finishes its answer
            request.rate_limit = {  # type: ignore[attr-defined]
                "RateLimit-Limit": str(self.num_requests),
                "RateLimit-Remaining": str(left),
                "RateLimit-Reset": str(int(self.duration)),
            }
        return allowed

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
