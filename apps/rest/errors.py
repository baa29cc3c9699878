"""Every error leaves as ``application/problem+json`` (RFC 9457), and bad input is never a 500."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from itertools import islice
from typing import Any

from django.core.exceptions import PermissionDenied, RequestDataTooBig, SuspiciousOperation
from django.db import DataError, OperationalError
from django.http import Http404
from django.http.request import UnreadablePostError
from rest_framework import exceptions
from rest_framework.response import Response
from rest_framework.views import set_rollback

from apps.rest.middleware import request_id
from apps.rest.problems import Problem, not_found
from esper.exceptions import CodecError, MessageError

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 100  # that one answer lists
TYPE_PREFIX = "/api/docs/problems#"
_CODES = {
    401: "not-signed-in",
    403: "forbidden",
    405: "method-not-allowed",
    406: "not-acceptable",
    415: "unsupported-media-type",
    429: "rate-limited",
}


def problem_response(error: Exception, context: Mapping[str, Any]) -> Response:
    """DRF's ``EXCEPTION_HANDLER``."""
    set_rollback()
    problem = _problem(error)
    if problem is None:
        log.error("unexpected error in %s", context["request"].path, exc_info=error)
        problem = Problem(
            500,
            "internal",
            "The server failed with an unexpected error. It is in the server's log.",
        )
    body = problem_body(problem, request_id(context["request"]))
    return Response(
        body, status=problem.status, headers=_headers(error, problem), content_type=MEDIA_TYPE
    )


def problem_body(problem: Problem, request: str) -> dict[str, Any]:
    """The members of a problem document."""
    return {
        **problem.extra,
        "type": TYPE_PREFIX + problem.code,
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
        "request_id": request,
        "errors": problem.extra.get("errors", []),
    }


def _problem(error: Exception) -> Problem | None:
    match error:
        case Problem():
            return error
        case MessageError():
            return _misfit(error)
        case CodecError():
            return Problem(400, "invalid", str(error))
        case exceptions.ValidationError():
            return _invalid(error)
        case exceptions.ParseError():
            return Problem(400, "invalid", str(error.detail))
        case exceptions.APIException():
            return _from_rest_framework(error)
        case Http404():
            return not_found("resource")
        case PermissionDenied():
            return Problem(403, "forbidden", str(error) or "You are not allowed to do this.")
        case RequestDataTooBig():
            return Problem(413, "too-large", "The body is larger than the limit.")
        case SuspiciousOperation() | UnreadablePostError():
            return Problem(400, "invalid", "The request is malformed.")
        case DataError():
            return Problem(400, "invalid", "A value does not fit into its database column.")
        case OperationalError():
            return Problem(503, "busy", "The database is busy. Send the request again in a moment.")
    return None


def _misfit(error: MessageError) -> Problem:
    place = {"pointer": error.pointer, "code": "invalid", "detail": error.reason}
    return Problem(400, "invalid", f"{error}.", errors=[place])


def _from_rest_framework(error: exceptions.APIException) -> Problem:
    extra = {}
    wait = getattr(error, "wait", None)  # of Throttled
    if wait is not None:
        extra["retry_after"] = max(1, int(wait))  # rest_framework has rounded it up
    code = _CODES.get(error.status_code, str(error.default_code).replace("_", "-"))
    return Problem(error.status_code, code, str(error.detail), **extra)


def _invalid(error: exceptions.ValidationError) -> Problem:
    errors = list(islice(_field_errors(error.detail, ""), MAX_ERRORS))
    first = errors[0] if errors else {"pointer": "", "detail": "The input is not valid."}
    where = f"{first['pointer']}: " if first["pointer"] else ""
    return Problem(400, "invalid", f"{where}{first['detail']}", errors=errors)


def _field_errors(detail: Any, pointer: str) -> Iterator[dict[str, str]]:
    if isinstance(detail, Mapping):
        for name, inner in detail.items():
            here = pointer if name == "non_field_errors" else f"{pointer}/{name}"
            yield from _field_errors(inner, here)
    elif isinstance(detail, list | tuple):
        for index, inner in enumerate(detail):
            nested = isinstance(inner, Mapping)
            yield from _field_errors(inner, f"{pointer}/{index}" if nested else pointer)
    else:
        code = str(getattr(detail, "code", "invalid"))
        yield {"pointer": pointer, "code": code, "detail": str(detail)}


def _headers(error: Exception, problem: Problem) -> dict[str, str]:
    headers = {}
    challenge = getattr(error, "auth_header", None)  # set by APIView for a 401
    if challenge:
        headers["WWW-Authenticate"] = str(challenge)
    if "retry_after" in problem.extra:
        headers["Retry-After"] = str(problem.extra["retry_after"])
    elif problem.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "1"
    return headers
