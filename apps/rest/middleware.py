"""An id for each request (in the answer, in problems, in the log); no NUL in addresses."""

from __future__ import annotations

import re
import uuid

from django.core.exceptions import BadRequest
from django.http import HttpRequest, HttpResponseBase
from django.utils.deprecation import MiddlewareMixin

HEADER = "X-Request-Id"
_SAFE = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestIdMiddleware(MiddlewareMixin):
    """Keeps the id that a proxy gave if it is well-formed, and makes one otherwise."""

    def process_request(self, request: HttpRequest) -> None:
        given = request.headers.get(HEADER, "")
        request.META[HEADER] = given if _SAFE.fullmatch(given) else uuid.uuid4().hex

    def process_response(
        self, request: HttpRequest, response: HttpResponseBase
    ) -> HttpResponseBase:
        response.headers[HEADER] = request_id(request)
        return response


class NoNulMiddleware(MiddlewareMixin):
    """Answers 400 to a page's address with a NUL, which PostgreSQL refuses in every text.

    The API is exempt: it answers such a value with a problem document.
    """

    def process_request(self, request: HttpRequest) -> None:
        if request.path.startswith("/api/v1/"):
            return
        if "\x00" in request.path or "%00" in request.META.get("QUERY_STRING", ""):
            raise BadRequest("the address holds a NUL character")


def request_id(request: HttpRequest) -> str:
    """The request's id; a new one where the middleware is not installed."""
    return str(request.META.setdefault(HEADER, uuid.uuid4().hex))
