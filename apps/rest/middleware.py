"""An id for each request, no NUL in addresses, no invisible characters in the admin."""

from __future__ import annotations

import re
import uuid

from django.core.exceptions import BadRequest
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.utils.deprecation import MiddlewareMixin

HEADER = "X-Request-Id"
# Directions and joiners of text, and spaces without width.
_INVISIBLE = re.compile("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
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


class VisibleAdminMiddleware(MiddlewareMixin):
    """Makes invisible characters visible in the admin, whose templates are Django's.

    Names come from outside; with U+202E one of them reverses what stands beside it.
    """

    def process_response(
        self, request: HttpRequest, response: HttpResponseBase
    ) -> HttpResponseBase:
        is_page = response.headers.get("Content-Type", "").startswith("text/html")
        if request.path.startswith("/admin/") and is_page and isinstance(response, HttpResponse):
            text = response.content.decode(response.charset)
            response.content = _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
        return response


def request_id(request: HttpRequest) -> str:
    """The request's id; a new one where the middleware is not installed."""
    return str(request.META.setdefault(HEADER, uuid.uuid4().hex))
